"""Third-party networks from the user's folders: image encoders, language models, detection and segmentation."""
