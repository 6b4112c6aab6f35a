"""The images of a subject, their captions, and prompts about its class."""
