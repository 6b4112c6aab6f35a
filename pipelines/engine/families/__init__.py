"""Model families.

A technique requires a capability (`registry.require`) and gets a `base.Family`; it never checks which family it is.
"""
