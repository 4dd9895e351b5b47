"""A finished run as the files that a trainer reads: one file a consumer, and what all of them share."""
