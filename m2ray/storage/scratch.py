"""Memory for what lies between a store and where it belongs."""

import threading

_OF_THREAD = threading.local()


def scratch(purpose: str, num_bytes: int) -> memoryview:
    """Memory that is this thread's until it asks for the same purpose again: to get fresh memory takes longer than to use it."""
    if len(getattr(_OF_THREAD, purpose, b"")) < num_bytes:
        setattr(_OF_THREAD, purpose, bytearray(num_bytes))
    return memoryview(getattr(_OF_THREAD, purpose))[:num_bytes]
