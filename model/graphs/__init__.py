"""One token of every sequence that is being written, as one recorded call: the way of written rows on a GPU."""
