"""Renderer of the demo world: antialiased 128x128 images with a subject mask, from attributes and a seed.

All random numbers are drawn from the seed in a fixed order before painting, so images with the same seed differ only
where their attributes differ: one is the ground truth of editing the other. Images are drawn with Pillow at three times
their size and downsampled.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageDraw

from .attributes import Attributes

SIZE = 128
SUPERSAMPLING = 3

Color = tuple[int, int, int]
Points = np.ndarray

OUTLINE: Color = (38, 30, 36)
INK: Color = (20, 16, 24)
SKIN_TONES: dict[str, Color] = {"light": (250, 214, 180), "tan": (214, 156, 104), "dark": (126, 80, 52)}
FUR: dict[str, Color] = {
    "white": (242, 242, 238),
    "black": (60, 60, 68),
    "brown": (136, 82, 42),
    "orange": (246, 150, 44),
    "pink": (248, 142, 186),
    "blue": (66, 118, 228),
    "green": (88, 184, 76),
}
# Colors of the patterns: far from the fur's color, and different from all fur colors.
PATTERN_INK: dict[str, Color] = {
    "white": (120, 120, 130),
    "black": (190, 190, 200),
    "brown": (226, 190, 140),
    "orange": (140, 62, 20),
    "pink": (176, 40, 110),
    "blue": (22, 40, 120),
    "green": (26, 92, 40),
}
HAIR: dict[str, Color] = {"black": (40, 36, 44), "brown": (122, 72, 36), "blonde": (244, 208, 96), "red": (206, 72, 28)}
# Objects and rare costumes of the harder world.
OBJECT_COLORS: dict[str, Color] = {"red": (226, 40, 48), "yellow": (255, 222, 40), "blue": (40, 92, 224)}
SMALL_SCALE = 0.84
EYES: dict[str, Color] = {"brown": (110, 60, 24), "blue": (48, 120, 230), "green": (40, 160, 70)}


@dataclasses.dataclass(frozen=True)
class Layout:
    """The random layout of an image."""

    horizon: float
    ornament_side: int
    scatter: tuple[tuple[float, float], ...]
    shift_x: float
    shift_y: float
    scale: float
    pattern_phase: float


def layout_of(seed: int) -> Layout:
    """Draw the layout of an image. The order of the draws must not change."""
    generator = random.Random(seed)
    return Layout(
        horizon=generator.uniform(76, 86),
        ornament_side=generator.choice((-1, 1)),
        scatter=tuple((generator.random(), generator.random()) for _ in range(14)),
        shift_x=generator.uniform(-6, 6),
        shift_y=generator.uniform(-3, 3),
        scale=generator.uniform(0.93, 1.05),
        pattern_phase=generator.uniform(0, 8),
    )


def ellipse(cx: float, cy: float, rx: float, ry: float, angle: float = 0.0, power: float = 2.0) -> Points:
    """Points of a (super)ellipse; ``power`` above 2 squares it off."""
    t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    x = rx * np.sign(np.cos(t)) * np.abs(np.cos(t)) ** (2 / power)
    y = ry * np.sign(np.sin(t)) * np.abs(np.sin(t)) ** (2 / power)
    c, s = math.cos(angle), math.sin(angle)
    return np.stack([cx + x * c - y * s, cy + x * s + y * c], 1)


def capsule(x0: float, y0: float, x1: float, y1: float, r0: float, r1: float | None = None) -> Points:
    """Points of a thick line from (x0, y0) to (x1, y1) with round ends."""
    r1 = r0 if r1 is None else r1
    angle = math.atan2(y1 - y0, x1 - x0)
    start = np.linspace(angle + np.pi / 2, angle + 3 * np.pi / 2, 10)
    end = np.linspace(angle - np.pi / 2, angle + np.pi / 2, 10)
    return np.concatenate(
        [
            np.stack([x0 + r0 * np.cos(start), y0 + r0 * np.sin(start)], 1),
            np.stack([x1 + r1 * np.cos(end), y1 + r1 * np.sin(end)], 1),
        ]
    )


def arc(cx: float, cy: float, rx: float, ry: float, start: float, end: float) -> Points:
    t = np.linspace(start, end, 12)
    return np.stack([cx + rx * np.cos(t), cy + ry * np.sin(t)], 1)


class Canvas:
    """A canvas with the subject mask and the mask of the parts that have the pattern."""

    def __init__(self) -> None:
        width = SIZE * SUPERSAMPLING
        self.image = Image.new("RGB", (width, width))
        self.subject = Image.new("L", (width, width), 0)
        self.furry = Image.new("L", (width, width), 0)
        self.draw = ImageDraw.Draw(self.image)
        self.draw_subject = ImageDraw.Draw(self.subject)
        self.draw_furry = ImageDraw.Draw(self.furry)

    def background(self, points: Iterable, color: Color) -> None:
        self.draw.polygon([(x * SUPERSAMPLING, y * SUPERSAMPLING) for x, y in points], fill=color)

    def rectangle(self, x0: float, y0: float, x1: float, y1: float, color: Color) -> None:
        self.background(((x0, y0), (x1, y0), (x1, y1), (x0, y1)), color)

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        image = self.image.resize((SIZE, SIZE), Image.Resampling.BOX)
        subject = self.subject.resize((SIZE, SIZE), Image.Resampling.BOX)
        return np.asarray(image), np.asarray(subject)


class Pen:
    """Paints the subject in its own coordinates: x in the direction it faces, y down, origin at (x, y)."""

    def __init__(self, canvas: Canvas, x: float, y: float, scale: float, forward: int) -> None:
        self.canvas, self.x, self.y, self.scale, self.forward = canvas, x, y, scale, forward

    def at(self, dx: float, dy: float) -> Pen:
        """The pen with its origin moved, for a head on its body."""
        return Pen(
            self.canvas, self.x + self.forward * dx * self.scale, self.y + dy * self.scale, self.scale, self.forward
        )

    def place(self, points: Points) -> list[tuple[float, float]]:
        points = np.asarray(points, float)
        x = (self.x + self.forward * points[:, 0] * self.scale) * SUPERSAMPLING
        y = (self.y + points[:, 1] * self.scale) * SUPERSAMPLING
        return list(zip(x.tolist(), y.tolist(), strict=True))

    def part(self, points: Points, color: Color, furry: bool = False, outline: float = 1.8) -> None:
        """A filled shape; furry parts have the pattern, and an outline of 0 disables the outline."""
        placed = self.place(points)
        self.canvas.draw.polygon(placed, fill=color)
        self.canvas.draw_furry.polygon(placed, fill=255 if furry else 0)
        self.canvas.draw_subject.polygon(placed, fill=255)
        if outline:
            closed, width = placed + placed[:1], round(outline * SUPERSAMPLING)
            self.canvas.draw.line(closed, fill=OUTLINE, width=width, joint="curve")
            self.canvas.draw_furry.line(closed, fill=0, width=width)
            self.canvas.draw_subject.line(closed, fill=255, width=width)

    def line(self, points: Points, color: Color, width: float) -> None:
        placed, thickness = self.place(points), round(width * self.scale * SUPERSAMPLING)
        self.canvas.draw.line(placed, fill=color, width=thickness, joint="curve")
        self.canvas.draw_furry.line(placed, fill=0, width=thickness)
        self.canvas.draw_subject.line(placed, fill=255, width=thickness)


def shade(color: Color, factor: float) -> Color:
    return tuple(min(255, int(v * factor)) for v in color)  # type: ignore[return-value]


def paint_place(canvas: Canvas, place: str, layout: Layout) -> None:
    """The background: two bands and the ornaments of the place."""
    horizon = layout.horizon
    side = 22 if layout.ornament_side < 0 else 106

    def disc(cx: float, cy: float, rx: float, ry: float, color: Color) -> None:
        canvas.background(ellipse(cx, cy, rx, ry), color)

    if place == "grass":
        canvas.rectangle(0, 0, SIZE, SIZE, (152, 210, 246))
        canvas.rectangle(0, horizon, SIZE, SIZE, (126, 200, 100))
        disc(side, 18, 14, 6, (250, 252, 255))
        disc(side + 9, 15, 9, 6, (250, 252, 255))
        for u, v in layout.scatter[:5]:
            x, y = 4 + 120 * u, horizon + 10 + (118 - horizon) * v
            canvas.background(((x - 3, y), (x, y - 8), (x + 3, y)), (70, 146, 62))
    elif place == "snow":
        canvas.rectangle(0, 0, SIZE, SIZE, (188, 204, 224))
        canvas.rectangle(0, horizon, SIZE, SIZE, (246, 249, 252))
        for k in range(3):
            base, half = horizon + 2 - 11 * k, 14 - 3 * k
            canvas.background(((side - half, base), (side, base - 20), (side + half, base)), (58, 112, 96))
        for u, v in layout.scatter:
            disc(4 + 120 * u, 4 + (horizon - 8) * v, 2, 2, (255, 255, 255))
    elif place == "beach":
        canvas.rectangle(0, 0, SIZE, SIZE, (146, 216, 250))
        canvas.rectangle(0, horizon - 20, SIZE, SIZE, (40, 124, 200))
        canvas.rectangle(0, horizon, SIZE, SIZE, (242, 220, 160))
        disc(side, 18, 11, 11, (255, 226, 84))
    elif place == "room":
        canvas.rectangle(0, 0, SIZE, SIZE, (236, 204, 180))
        canvas.rectangle(0, horizon, SIZE, SIZE, (170, 120, 84))
        canvas.rectangle(0, horizon - 4, SIZE, horizon, (250, 240, 228))
        canvas.rectangle(side - 16, 8, side + 16, 42, (120, 84, 60))
        for x in (side - 13, side + 1.5):
            canvas.rectangle(x, 11, x + 11.5, 39, (178, 222, 248))
    elif place == "desert":
        canvas.rectangle(0, 0, SIZE, SIZE, (242, 220, 160))
        canvas.rectangle(0, horizon, SIZE, SIZE, (170, 120, 84))
        canvas.background(capsule(side, horizon + 6, side, horizon - 34, 6), (58, 112, 96))
        for dx, dy in ((-13, 12), (13, 18)):
            canvas.background(capsule(side + dx, horizon - dy, side + dx, horizon - dy - 10, 4), (58, 112, 96))
            canvas.background(capsule(side, horizon - dy, side + dx, horizon - dy, 4), (58, 112, 96))
    else:
        canvas.rectangle(0, 0, SIZE, SIZE, (28, 32, 80))
        canvas.rectangle(0, horizon, SIZE, SIZE, (48, 72, 66))
        disc(side, 19, 11, 11, (250, 244, 200))
        disc(side + 5, 16, 9, 9, (28, 32, 80))
        for u, v in layout.scatter:
            disc(4 + 120 * u, 4 + (horizon - 12) * v, 1.6, 1.6, (255, 250, 210))


def paint_object(canvas: Canvas, beside: str, layout: Layout) -> None:
    """An object on the side that has no ornament, behind the subject; a balloon is in the sky."""
    name, shape = beside.split()
    color = OBJECT_COLORS[name]
    x = 112 if layout.ornament_side < 0 else 16

    def outlined(points: Points, color: Color) -> None:
        middle = points.mean(0)
        canvas.background(middle + (points - middle) * 1.14, OUTLINE)
        canvas.background(points, color)

    if shape == "balloon":
        canvas.rectangle(x - 1, 34, x + 1, 60, OUTLINE)
        outlined(ellipse(x, 22, 11, 13), color)
    elif shape == "ball":
        outlined(ellipse(x, 108, 12, 12), color)
    else:
        outlined(np.array([(x - 12, 96), (x + 12, 96), (x + 12, 120), (x - 12, 120)]), color)


def paint_face(head: Pen, expression: str, iris: Color, size: float, muzzle: bool, nose: Color) -> None:
    """Eyes, brows, nose, mouth and tears; ``size`` 1 fits a head of radius 25."""
    forward = 6 * size

    def at(points: Points) -> Points:
        return np.asarray(points) * size + [forward, 0]

    if muzzle:
        head.part(at(ellipse(1, 9, 14, 10.5)), (252, 240, 226), outline=0)
    for side in (-1, 1):
        x, y = side * 9.5, -4.0
        if expression == "crying":
            head.line(at(arc(x, y - 1, 5, 4, 0.1, math.pi - 0.1)), INK, 2.8 * size)
            head.part(at(capsule(x + side * 1.5, y + 6, x + side * 3, y + 20, 2.6, 4.0)), (64, 160, 255), outline=0)
        else:
            head.part(at(ellipse(x, y, 5.6, 6.6)), (255, 255, 255), outline=0)
            head.part(at(ellipse(x + 1.6, y + 0.4, 3.9, 4.8)), iris, outline=0)
            if iris != INK:
                head.part(at(ellipse(x + 1.8, y + 0.4, 1.7, 2.2)), INK, outline=0)
        if expression == "angry":
            head.line(at(np.array([(x - 6.5, y - 8 + side * 3.6), (x + 6.5, y - 8 - side * 3.6)])), INK, 4.0 * size)
    if muzzle:
        head.part(at(ellipse(2, 4.5, 3.8, 2.6)), nose, outline=0)
    else:
        head.line(at(np.array([(1, 0), (4.5, 5), (0.5, 5.5)])), nose, 2.2 * size)
    x, y = 1.5, 12.0
    if expression == "smiling":
        mouth = arc(x, y - 2, 9.5, 8, 0, math.pi)
        head.part(at(mouth), (212, 50, 62), outline=0)
        head.line(at(np.concatenate([mouth, mouth[:1]])), INK, 1.8 * size)
    elif expression == "neutral":
        head.line(at(np.array([(x - 6, y), (x + 6, y)])), INK, 2.6 * size)
    elif expression == "angry":
        head.line(at(arc(x, y + 4.5, 8, 6, math.pi, 2 * math.pi)), INK, 3.0 * size)
    else:
        head.part(at(ellipse(x, y + 2, 4.6, 4.8)), (90, 26, 38), outline=0)


def paint_headwear(head: Pen, costume: str, rx: float, top: float) -> None:
    """A hat on a head of half width ``rx`` with its top at ``top`` (negative is up)."""
    s = rx / 25
    y = top + 9 * s
    if costume == "santa hat":
        head.part(np.array([(-20 * s, y), (-3 * s, y - 30 * s), (20 * s, y)]), (218, 34, 44))
        head.part(
            np.array([(-3 * s, y - 30 * s), (-20 * s, y - 24 * s), (-11 * s, y - 14 * s)]), (218, 34, 44), outline=0
        )
        head.part(capsule(-19 * s, y, 19 * s, y, 5.2 * s), (252, 252, 252))
        head.part(ellipse(-20 * s, y - 24 * s, 6 * s, 6 * s), (252, 252, 252))
    elif costume == "crown":
        spikes = [(-18, 3), (-21, -19), (-10, -8), (0, -23), (10, -8), (21, -19), (18, 3)]
        head.part(np.array(spikes) * s + [0, y], (255, 214, 36))
        head.part(ellipse(0, y - 5 * s, 3.6 * s, 3.6 * s), (220, 36, 60), outline=0)
    elif costume == "top hat":
        head.part(np.array([(-15 * s, y), (-17 * s, y - 28 * s), (17 * s, y - 28 * s), (15 * s, y)]), (44, 40, 52))
        head.part(np.array([(-15 * s, y - 3 * s), (-16 * s, y - 10 * s), (16 * s, y - 10 * s), (15 * s, y - 3 * s)]),
                  (240, 240, 240), outline=0)  # fmt: skip
        head.part(capsule(-26 * s, y, 26 * s, y, 3.4 * s), (44, 40, 52))
    elif costume == "party hat":
        head.part(np.array([(-15 * s, y), (0, y - 32 * s), (15 * s, y)]), (150, 60, 190))
        head.part(ellipse(0, y - 32 * s, 6 * s, 6 * s), (255, 214, 36))


def paint_scarf(head: Pen, chin: float, half: float, size: float = 1.0) -> None:
    """A thick scarf under the chin, in a color that nothing else has."""
    purple: Color = (150, 60, 190)
    head.part(capsule(-half * 0.5, chin, -half * 0.5 - 4 * size, chin + 15 * size, 4.6 * size), shade(purple, 0.8))
    head.part(capsule(-half, chin, half, chin, 5.6 * size), purple)


def paint_bow_tie(head: Pen, chin: float) -> None:
    """A bow tie under the chin."""
    red: Color = (218, 34, 44)
    for side in (-1, 1):
        head.part(np.array([(0, chin), (side * 17, chin - 10), (side * 17, chin + 10)]), red)
    head.part(ellipse(0, chin, 4.5, 4.5), shade(red, 0.7), outline=0)


def paint_pattern(canvas: Canvas, pen: Pen, pattern: str, color: Color, phase: float) -> None:
    """Stripes or spots over every furry part painted so far."""
    if pattern == "plain":
        return
    marks = Image.new("L", canvas.furry.size, 0)
    draw = ImageDraw.Draw(marks)
    if pattern == "striped":
        for k in range(-9, 10):
            x = k * 11 + phase
            stripe = np.array([(x + 3, -110), (x - 2, -75), (x + 3, -40), (x - 2, -5), (x + 2, 24)])
            draw.line(pen.place(stripe), fill=255, width=round(5.0 * pen.scale * SUPERSAMPLING))
    else:
        for row, y in enumerate(range(-112, 26, 12)):
            for x in range(-72, 74, 14):
                cx = x + phase + (7 if row % 2 else 0)
                draw.polygon(pen.place(ellipse(cx, y, 4.2, 4.2)), fill=255)
    on_fur = np.minimum(np.asarray(canvas.furry), np.asarray(marks))
    canvas.image.paste(color, (0, 0), Image.fromarray(on_fur))


def paint_figure(canvas: Canvas, a: Attributes, layout: Layout) -> None:
    """A whole animal or person, standing on the ground."""
    forward = 1 if a.facing == "right" else -1
    # A jumping person is taller than an animal: less lift keeps the hat in the frame.
    lift = 0.0 if a.pose != "jumping" else 12.0 if a.species == "person" else 18.0
    ground = 117 + layout.shift_y
    # A small subject may stand farther from the middle.
    factor, reach = (SMALL_SCALE, 3) if a.size == "small" else (1.0, 1)
    lift *= factor
    x = SIZE / 2 + layout.shift_x * reach
    shadow = ellipse(x, ground + 1, (24 if lift else 32) * factor, 4.5 * factor)
    under = canvas.image.getpixel((int(x * SUPERSAMPLING), int((ground + 1) * SUPERSAMPLING)))
    canvas.background(shadow, shade(under, 0.76))  # type: ignore[arg-type]
    pen = Pen(canvas, x, ground - lift, layout.scale * factor, forward)
    head = pen.at(*(paint_person_body(pen, a) if a.species == "person" else paint_animal_body(pen, a)))
    if a.species == "person":
        paint_person_head(head)
    else:
        paint_animal_head(head, a)
    paint_pattern(canvas, pen, a.pattern, PATTERN_INK[a.color], layout.pattern_phase)
    canvas.draw = ImageDraw.Draw(canvas.image)
    muzzle = a.species != "person"
    nose: Color = (232, 104, 130) if a.species == "rabbit" else ((60, 36, 40) if muzzle else (200, 130, 96))
    paint_face(head, a.expression, INK, 1.0, muzzle, nose)
    if a.costume == "scarf":
        paint_scarf(head, 24, 17)
    elif a.costume == "bow tie":
        paint_bow_tie(head, 25)
    paint_headwear(head, a.costume, 25, -23)


def paint_animal_body(pen: Pen, a: Attributes) -> tuple[float, float]:
    """Paint the body and return the position of the head."""
    fur = FUR[a.color]
    dark = shade(fur, 0.8)
    bear = a.species == "bear"
    width, leg = (1.2, 6.4) if bear else (1.0, 5.2)

    def tail(x: float, y: float, angle: float) -> None:
        c, s = math.cos(angle), math.sin(angle)
        if a.species == "cat":
            t = np.linspace(0, 1, 9)
            px, py = x - 24 * t * c - 4 * np.sin(4 * t), y - 24 * t * s - 3 * np.sin(5 * t)
            pen.part(np.concatenate([np.stack([px, py - 3.4], 1), np.stack([px, py + 3.4], 1)[::-1]]), fur, furry=True)
        elif a.species == "dog":
            pen.part(capsule(x, y, x - 17 * c, y - 17 * s, 5, 2.6), fur, furry=True)
        elif bear:
            pen.part(ellipse(x - 1, y, 5.5, 5.5), fur, furry=True)
        else:
            pen.part(ellipse(x - 2, y, 8, 8), (252, 252, 252))

    if a.pose == "standing":
        tail(-27, -30, 0.9)
        for x in (-14, 14):
            pen.part(capsule(x, -20, x, -5, leg), dark)
        for x in (-22, 6):
            pen.part(capsule(x, -20, x, -4, leg), fur, furry=True)
        pen.part(ellipse(-6, -26, 27, 14 * width), fur, furry=True)
        return (17, -52)
    if a.pose == "sitting":
        tail(-20, -8, 0.35)
        pen.part(ellipse(-4, -23, 17 * width, 23, 0.18), fur, furry=True)
        pen.part(ellipse(-11, -11, 15 * width, 11), fur, furry=True)
        pen.part(capsule(11, -24, 13, -5, leg), fur, furry=True)
        pen.part(capsule(2, -22, 4, -5, leg), fur, furry=True)
        return (6, -62)
    if a.pose == "jumping":
        tail(-24, -12, -0.3)
        pen.part(capsule(-16, -16, -36, 0, leg), dark)
        pen.part(capsule(12, -28, 40, -24, leg), dark)
        pen.part(ellipse(-4, -22, 27, 13 * width, -0.5), fur, furry=True)
        pen.part(capsule(-18, -10, -29, 10, leg), fur, furry=True)
        pen.part(capsule(10, -26, 38, -34, leg), fur, furry=True)
        return (15, -52)
    tail(-36, -10, 0.15)
    pen.part(ellipse(-9, -14, 32, 12.5 * width), fur, furry=True)
    pen.part(capsule(12, -6, 42, -5, leg), fur, furry=True)
    pen.part(capsule(-30, -5, -10, -4.5, leg), fur, furry=True)
    return (18, -34)


def paint_animal_head(head: Pen, a: Attributes) -> None:
    fur = FUR[a.color]
    if a.species == "cat":
        for side in (-1, 1):
            head.part(np.array([(side * 5, -19), (side * 22, -37), (side * 24, -6)]), fur, furry=True)
            head.part(np.array([(side * 12, -20), (side * 20, -30), (side * 20, -15)]), (246, 170, 180), outline=0)
    elif a.species == "bear":
        for side in (-1, 1):
            head.part(ellipse(side * 19, -19, 9.5, 9.5), fur, furry=True)
            head.part(ellipse(side * 19, -19, 4.8, 4.8), (252, 240, 226), outline=0)
    elif a.species == "rabbit":
        for side in (-1, 1):
            head.part(ellipse(side * 11 - 2, -36, 7, 20, side * 0.16), fur, furry=True)
            head.part(ellipse(side * 11 - 2, -35, 3.4, 13, side * 0.16), (246, 170, 180), outline=0)
    head.part(ellipse(0, 0, 25, 23), fur, furry=True)
    if a.species == "dog":
        for side in (-1, 1):
            head.part(ellipse(side * 24, 2, 7.5, 17, side * -0.2), shade(fur, 0.66))


def paint_person_body(pen: Pen, a: Attributes) -> tuple[float, float]:
    """Paint the body and return the position of the head."""
    clothes = FUR[a.color]
    skin = SKIN_TONES["light"]
    trousers: Color = (74, 78, 110)
    if a.pose == "standing":
        for x in (-8, 7):
            pen.part(capsule(x, -18, x, -4, 5.6), trousers)
        pen.part(capsule(-15, -36, -22, -18, 4.6), skin)
        pen.part(capsule(15, -36, 21, -18, 4.6), skin)
        pen.part(capsule(0, -36, 0, -24, 14, 16), clothes, furry=True)
        return (2, -66)
    if a.pose == "sitting":
        pen.part(capsule(-8, -30, -8, -14, 14, 16), clothes, furry=True)
        pen.part(capsule(-6, -7, 26, -7, 6.2), trousers)
        pen.part(capsule(28, -7, 34, -8, 6.0), (70, 50, 44))
        pen.part(capsule(-2, -30, 14, -17, 4.6), skin)
        return (-5, -58)
    if a.pose == "jumping":
        pen.part(capsule(-8, -16, -24, -2, 5.6), trousers)
        pen.part(capsule(7, -16, 24, -5, 5.6), trousers)
        pen.part(capsule(-12, -38, -36, -52, 4.6), skin)
        pen.part(capsule(12, -38, 37, -50, 4.6), skin)
        pen.part(capsule(0, -35, 0, -23, 14, 16), clothes, furry=True)
        return (2, -62)
    pen.part(capsule(-24, -8, -48, -6, 6.2), trousers)
    pen.part(capsule(-20, -12, 4, -13, 12.5, 12), clothes, furry=True)
    pen.part(capsule(2, -6, 34, -5, 4.6), skin)
    return (18, -31)


def paint_person_head(head: Pen) -> None:
    hair = HAIR["brown"]
    head.part(ellipse(-2, -4, 27, 24), hair)
    head.part(ellipse(0, 1, 24, 22), SKIN_TONES["light"])
    fringe = np.array([(-23, -7), (-17, -19), (0, -25), (17, -18), (23, -7), (8, -13), (-8, -13)])
    head.part(fringe, hair, outline=0)


def portrait_origin(a: Attributes, layout: Layout) -> tuple[float, float, float, int]:
    """Position, scale and direction of a portrait's head: the arguments of ``Pen``."""
    forward = 1 if a.facing == "right" else -1
    return SIZE / 2 + layout.shift_x * 0.7, 73 + layout.shift_y, layout.scale * 0.96, forward


def paint_portrait(canvas: Canvas, a: Attributes, layout: Layout) -> None:
    """A person's head and shoulders, filling the frame."""
    skin, hair = SKIN_TONES[a.skin], HAIR[a.hair_color]
    rx, ry, power = {"round": (35.0, 34.0, 2.0), "long": (28.0, 41.0, 2.0), "square": (33.0, 35.0, 4.5)}[a.face_shape]
    head = Pen(canvas, *portrait_origin(a, layout))
    # Shoulders and neck have the same origin; the head is painted over them.
    if a.hair_style == "long":
        head.part(capsule(-3, -8, -3, 40, rx + 9, rx + 11), hair)
    elif a.hair_style == "curly":
        for angle in np.linspace(-math.pi * 1.08, math.pi * 0.08, 9):
            head.part(ellipse((rx + 3) * math.cos(angle) - 2, -4 + (ry + 1) * math.sin(angle), 12, 12), hair)
    else:
        head.part(ellipse(-2, -7, rx + 5, ry + 1, power=power), hair)
    head.part(np.array([(-58, 70), (-48, 46), (-16, 36), (16, 36), (48, 46), (58, 70)]), (92, 104, 136))
    head.part(capsule(0, 28, 0, 42, 12), shade(skin, 0.9), outline=0)
    if a.costume == "scarf":
        paint_scarf(head, ry + 8, 26, size=1.5)
    head.part(ellipse(0, 0, rx, ry, power=power), skin, outline=2.0)
    top = -ry
    if a.hair_style == "curly":
        for x in np.linspace(-rx * 0.72, rx * 0.72, 5):
            y = top + 8 + 7 * (x / rx) ** 2 * 1.6
            head.part(ellipse(x, y, 9.5, 8), hair)
    else:
        depth = 15 if a.hair_style == "short" else 11
        fringe = np.concatenate(
            [
                arc(-1, -2, rx + 2, ry + 2, math.pi * 1.06, math.pi * 1.94),
                [(rx * 0.4, top + depth), (-rx * 0.45, top + depth)],
            ]
        )
        head.part(fringe, hair, outline=0)
    paint_face(head, a.expression, EYES[a.eye_color], 1.36, muzzle=False, nose=shade(skin, 0.66))
    if a.costume in ("santa hat", "crown"):
        # A portrait's hat sits lower than a figure's, because the frame ends above the head.
        paint_headwear(head, a.costume, min(rx, 32.0), top - 1)


def render(attributes: Attributes, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Render one image.

    Args:
        attributes: its content.
        seed: seed of its layout.

    Returns:
        The image, uint8 [128, 128, 3], and the mask, uint8 [128, 128], with 255 on the subject, including its costume
        but not its shadow.
    """
    layout = layout_of(seed)
    canvas = Canvas()
    paint_place(canvas, attributes.place, layout)
    if attributes.beside != "none":
        paint_object(canvas, attributes.beside, layout)
    if attributes.framing == "portrait":
        paint_portrait(canvas, attributes, layout)
    else:
        paint_figure(canvas, attributes, layout)
    return canvas.finish()
