"""UniFashion from scratch: one fashion model for retrieval, captions, try-on and design (arXiv 2408.11305)."""


class UserError(Exception):
    """What the user asked for cannot be done as asked: the scripts print it as one line and exit with code 2."""
