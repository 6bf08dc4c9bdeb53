"""Doors into other packages. Each module here registers onepass with one package when it is imported, and not before."""
