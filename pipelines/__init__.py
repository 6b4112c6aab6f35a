"""The techniques: one package for each, over shared packages for inversion, training, text and files.

Plain functions and small classes over tensors and ComfyUI models, without nodes or widgets. Only `engine` imports
`comfy.*`.
"""
