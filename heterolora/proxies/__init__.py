"""Zero-cost proxies: scores of sites from a few batches. One file a proxy; the shared gradient pass is in evidence."""
