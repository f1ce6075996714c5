"""The Segment Anything families: what is known of them, how to tell them apart, how to build and run them."""
