"""What the papers do: schedules, inversion, optimization, guidance, files.

Plain functions and small classes over tensors and ComfyUI models; no node, no widget, no file dialogue. Only
`engine` speaks to ComfyUI (`comfy.*`); every other module is torch and arithmetic.
"""
