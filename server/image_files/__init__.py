"""Decoding uploaded images, in processes of their own: metadata skipped, colours in sRGB."""
