"""Degradations y = A(x) + noise of images in [-1, 1], as components of kind "operator", for `vgm restore`.

The settings are constructor keywords; `bind` then fixes the shape of the images and draws what is random (masks, blur
kernels) from one generator per item, so that an item does not depend on its batch. See base.Operator.
"""
