"""The structs of Parquet that are read or written here, by their names there and without the fields that nothing here has.

Source: https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
"""

from m2ray.parquet.thrift import BINARY, BOOL, I16, I32, I64, List, Struct

MAGIC = b"PAR1"
"""A file begins and ends with it. Before the end are the footer, FILE_META_DATA, and its length as 4 little-endian bytes."""

INT32, INT64, FIXED_LEN_BYTE_ARRAY = 1, 2, 7  # Type
REQUIRED = 0  # FieldRepetitionType
PLAIN, RLE = 0, 3  # Encoding
UNCOMPRESSED, ZSTD = 0, 6  # CompressionCodec
DATA_PAGE = 0  # PageType

# -- a page ---------------------------------------------------------------------------------------------------------------

DATA_PAGE_HEADER = Struct(
    num_values=(1, I32),
    encoding=(2, I32),
    definition_level_encoding=(3, I32),
    repetition_level_encoding=(4, I32),
)

PAGE_HEADER = Struct(
    type=(1, I32),
    uncompressed_page_size=(2, I32),
    compressed_page_size=(3, I32),
    crc=(4, I32),
    data_page_header=(5, DATA_PAGE_HEADER),
)

# -- the page index -------------------------------------------------------------------------------------------------------

PAGE_LOCATION = Struct(offset=(1, I64), compressed_page_size=(2, I32), first_row_index=(3, I64))

OFFSET_INDEX = Struct(page_locations=(1, List(PAGE_LOCATION)))

# -- the footer -----------------------------------------------------------------------------------------------------------

STATISTICS = Struct(
    max=(1, BINARY),
    min=(2, BINARY),
    null_count=(3, I64),
    max_value=(5, BINARY),
    min_value=(6, BINARY),
    is_max_value_exact=(7, BOOL),
    is_min_value_exact=(8, BOOL),
)

PAGE_ENCODING_STATS = Struct(page_type=(1, I32), encoding=(2, I32), count=(3, I32))

KEY_VALUE = Struct(key=(1, BINARY), value=(2, BINARY))

COLUMN_META_DATA = Struct(
    type=(1, I32),
    encodings=(2, List(I32)),
    path_in_schema=(3, List(BINARY)),
    codec=(4, I32),
    num_values=(5, I64),
    total_uncompressed_size=(6, I64),
    total_compressed_size=(7, I64),
    key_value_metadata=(8, List(KEY_VALUE)),
    data_page_offset=(9, I64),
    dictionary_page_offset=(11, I64),
    statistics=(12, STATISTICS),
    encoding_stats=(13, List(PAGE_ENCODING_STATS)),
)

COLUMN_CHUNK = Struct(
    file_offset=(2, I64),
    meta_data=(3, COLUMN_META_DATA),
    offset_index_offset=(4, I64),
    offset_index_length=(5, I32),
    column_index_offset=(6, I64),
    column_index_length=(7, I32),
)

ROW_GROUP = Struct(
    columns=(1, List(COLUMN_CHUNK)),
    total_byte_size=(2, I64),
    num_rows=(3, I64),
    file_offset=(5, I64),
    total_compressed_size=(6, I64),
    ordinal=(7, I16),
)

SCHEMA_ELEMENT = Struct(
    type=(1, I32),
    type_length=(2, I32),
    repetition_type=(3, I32),
    name=(4, BINARY),
    num_children=(5, I32),
)

COLUMN_ORDER = Struct(type_order=(1, Struct()))

FILE_META_DATA = Struct(
    version=(1, I32),
    schema=(2, List(SCHEMA_ELEMENT)),
    num_rows=(3, I64),
    row_groups=(4, List(ROW_GROUP)),
    key_value_metadata=(5, List(KEY_VALUE)),
    created_by=(6, BINARY),
    column_orders=(7, List(COLUMN_ORDER)),
)
