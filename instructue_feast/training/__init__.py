"""Training: UserQA in, a trained `InstructUEModel` out.

Import from the modules; this file imports nothing, so that reading settings does not load torch.
"""
