"""Integer tables of the codecs, as data, and the programs that made them."""
