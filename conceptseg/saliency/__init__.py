"""From activations to maps: cells (one small map per space, layer, timestep and draw) and the views that fold them."""
