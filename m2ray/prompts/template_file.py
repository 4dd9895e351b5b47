"""A chat template of the user's own, from a file: it takes the place of the model's."""

from m2ray.errors import PromptsError
from m2ray.prompts.remote import file_at, reading_store

_MOST_BYTES = 1 << 20
"""The longest that a model was seen to have are 30 kB."""


def read_template(address: str) -> str:
    """The text of the file at a path or URL. Raises PromptsError if there is none, or one that is no text of up to 1 MiB."""
    path = file_at(address)
    try:
        with reading_store(), path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise PromptsError(
            f"Cannot read the chat template {path}: {error.strerror}.", "Check the path; every node that runs m2ray's driver must see it."
        ) from error
    except UnicodeDecodeError as error:
        raise PromptsError(f"The chat template {path} is no UTF-8: its byte {error.start} is wrong.", "Save it as UTF-8.") from error
    if len(data) > _MOST_BYTES:
        raise PromptsError(f"The chat template {path} has more than {_MOST_BYTES:,} bytes.", "Give the file of a Jinja template.")
    return text
