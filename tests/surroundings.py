"""An adapter made by itself, where nothing is asked."""

from heterolora.adapters.base import Surroundings

ALONE = Surroundings(lambda name: None, {})
