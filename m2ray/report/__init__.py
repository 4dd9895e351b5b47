"""A run as one page for people: `m2ray report`. Reads runs, and knows nothing of what makes them."""
