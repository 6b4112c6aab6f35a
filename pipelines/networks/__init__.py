"""Networks of other libraries, read from the user's folders: encoders, language models, segmentation."""
