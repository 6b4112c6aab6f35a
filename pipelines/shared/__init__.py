"""Shared utilities: errors, input checks, files, images, masks and conditionings."""
