"""What would stop or slow a run on a machine or a cluster, said before one is begun: the facts, and what is wrong with them."""
