"""The families of models: what techniques ask of a model, and what each family answers.

A technique asks for a capability (`registry.require`) and gets a `base.Family`; it never asks which family it has.
"""
