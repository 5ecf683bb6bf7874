"""The model: bundled models, text encoders, adapters, focus, prompt layout, and `InstructUEModel`.

Import from the modules; this file imports nothing, so that reading a config does not load torch.
"""
