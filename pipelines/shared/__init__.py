"""What every technique uses: errors, input checks, files, images, masks, conditionings."""
