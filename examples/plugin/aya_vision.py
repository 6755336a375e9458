"""Settings for an architecture that domainbed-reasoning has no entry for: Aya Vision, with tiles.

Without this entry Aya Vision works too, with one tile per image: how to ask its processor for a fixed number of tiles
cannot be probed. `max_tiles` above 1 needs an entry, and so does the cost model (`plan`).
"""

from domainbed_reasoning import Family


def tile_edge(image_processor):
    """Return the edge in pixels of a tile."""
    return int(image_processor.size["height"])


def image_settings(edge, grid):
    """Return the image processor's arguments that cut a square image into grid x grid tiles (and a thumbnail)."""
    tiles = {"min_patches": grid * grid, "max_patches": grid * grid} if grid > 1 else {}
    return {"crop_to_patches": grid > 1, **tiles}


def image_tokens(config, edge):
    """Return how many tokens of the language model a tile is."""
    return (edge // config.vision_config.patch_size // config.downsample_factor) ** 2


AYA_VISION = Family(
    name="Aya Vision",
    tile_edge=tile_edge,
    image_settings=image_settings,
    tiled=True,
    image_tokens=image_tokens,
    tree="",  # its sliding windows share no prefix: one row each
    example="CohereLabs/aya-vision-8b",
)
