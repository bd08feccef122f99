"""Obey a plan: bytes are read once, in order (``sources``), cast, and written once (``blocks``), by one loop (``write``)."""
