"""A dataset that needs no files: polygons, drawn filled or as outlines, with a chain for each."""

import math
import random

from PIL import Image, ImageDraw

from domainbed_reasoning import ReasoningDataset

STYLES = {"filled": {"fill": "white"}, "outline": {"outline": "white"}, "gray": {"fill": "gray", "outline": "white"}}
CORNERS = {"triangle": 3, "square": 4, "hexagon": 6}


class PolygonsReasoning(ReasoningDataset):
    """Polygons in three styles.

    Input: RGB image of 48 x 48 pixels (28 x 28 for baselines), drawn from (domain, index) alone.
    Label: 3 classes (triangle, square, hexagon).
    Domains: filled, outline, gray; 120 images each.
    Chains: written by the program that draws the images.
    """

    ENVIRONMENTS = list(STYLES)
    CLASS_NAMES = list(CORNERS)
    SUBJECT = "polygon"
    INPUT_SHAPE = (3, 28, 28)
    TWIN = "Debug28"  # baselines get DomainBed's hyper-parameters for small images
    N_STEPS = 61
    CHECKPOINT_FREQ = 20
    N_WORKERS = 0

    def labels(self, env):
        """Return the class of every image of a domain."""
        return [index % len(CORNERS) for index in range(120)]

    def picture(self, env, index):
        """Draw an image."""
        draw_from = random.Random(1000 * env + index)
        image = Image.new("RGB", (48, 48), (draw_from.randrange(90), draw_from.randrange(90), draw_from.randrange(90)))
        corners, angle = list(CORNERS.values())[index % len(CORNERS)], draw_from.random()
        turns = [angle + corner / corners for corner in range(corners)]
        points = [(24 + 18 * math.cos(math.tau * turn), 24 + 18 * math.sin(math.tau * turn)) for turn in turns]
        ImageDraw.Draw(image).polygon(points, **list(STYLES.values())[env])
        return image

    def chain(self, env, index):
        """Return the five-stage chain of an image."""
        name = list(CORNERS)[index % len(CORNERS)]
        return (
            "<SUMMARY>I count the corners of the polygon.</SUMMARY>\n"
            f"<CAPTION>A polygon on a dark ground, {self.ENVIRONMENTS[env]}.</CAPTION>\n"
            f"<REASONING>It has {CORNERS[name]} corners, and all its sides are equal.</REASONING>\n"
            "<REFLECTION>Style and color do not matter.</REFLECTION>\n"
            f"<CONCLUSION>{name}</CONCLUSION>"
        )
