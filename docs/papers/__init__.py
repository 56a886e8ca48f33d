"""A page per paper, which `vgm explain` reads: the idea, the equations and the functions that implement them."""
