"""Parquet, written and read page by page: columns of fixed-size values go from and to memory as they lie. It knows of Parquet alone.

Reading order: structs (what a file is made of), column_chunks and footer (writing), pages (reading).
"""
