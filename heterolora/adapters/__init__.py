"""The low-rank maps: families of adapters that live at sites."""
