"""Plans: exact bytes, hardware and spans, before a GPU is touched. Pure values in, pure values out."""
