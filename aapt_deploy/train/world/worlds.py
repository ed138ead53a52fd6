"""Render the world to learn: endless land, a free camera, a look chosen by a prompt.

A voxel-space renderer in plain NumPy. The ground is a height map on a torus; each picture column
casts one ray over the ground, samples heights at log-spaced depths and keeps, per pixel, the first
depth that reaches its row (a running minimum replaces a depth buffer). Light, colour and cloud
shadow are baked into textures once per world. Deterministic by seed. About 100 frames/s at 192x112
on one core.

It does no caves, towns or reflections: one surface, one sky.
"""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from aapt_deploy.models.aapt.camera import FIELD_OF_VIEW, LIMITS, Pose, Velocity, focal_length
from aapt_deploy.models.aapt.prompts import ATTRIBUTES, Look

SIZE = 512  # cells per side of the torus; one cell is one world unit
DEPTHS = np.geomspace(3.0, 460.0, 150).astype(np.float32)  # world units along the view axis
SUPERSAMPLE = 2  # rows drawn per picture row
MIPS = 5  # colour textures, each blurred to twice the previous footprint

Pair = tuple[np.ndarray, np.ndarray]

# Ground by place: heights in world units, how much of them is ridged, camera altitude, water level,
# colours from low to high.
PLACES = {
    "mountains": {"amplitude": 74.0, "ridged": 0.80, "slope": 2.25, "altitude": 54.0, "water": 4.0},
    "desert": {"amplitude": 26.0, "ridged": 0.55, "slope": 2.35, "altitude": 30.0, "water": -99.0},
    "islands": {"amplitude": 54.0, "ridged": 0.35, "slope": 1.95, "altitude": 34.0, "water": 25.0},
    "forest": {"amplitude": 38.0, "ridged": 0.15, "slope": 1.85, "altitude": 38.0, "water": 9.0},
}
GROUND = {  # (place, season) -> low, middle, high colour
    "mountains": {
        "spring": ("6f9a4a", "7d7a62", "e9eef2"), "summer": ("5f8a3c", "80735a", "c9c4bb"),
        "autumn": ("b5803a", "7d6650", "e2ddd6"), "winter": ("dfe6ec", "a9b1bd", "f6f9fc")},
    "desert": {"spring": ("c9a566", "d9b273", "b5915c"), "summer": ("d89a52", "e8b566", "c07a42"),
               "autumn": ("b8703f", "cf8a50", "99552f"), "winter": ("d8cdb8", "e9e3d6", "f4f1ea")},
    "islands": {"spring": ("e2d3a0", "79b04c", "5c8a3e"), "summer": ("ecdba6", "58a045", "3f7f3a"),
                "autumn": ("dcc690", "c98f3a", "a8602f"), "winter": ("d7dbdd", "e6ecf0", "fafcfd")},
    "forest": {"spring": ("86b84f", "5f9c41", "8a9a58"), "summer": ("4f8a38", "2f6b2f", "6b7f45"),
               "autumn": ("d08a2e", "b5541f", "8f6a35"), "winter": ("e3e9ee", "8fa39b", "f2f6f9")},
}  # fmt: skip
WATER = {"spring": "3f86a0", "summer": "2a8fb0", "autumn": "46748a", "winter": "9fb6c6"}
SKY = {  # time -> zenith, horizon, sunlight, ambient, sun elevation (rad)
    "dawn": ("6f8fc4", "f6c3a6", (1.10, 0.86, 0.74), (0.42, 0.40, 0.50), 0.30),
    "noon": ("3f7fd0", "bcdcf2", (1.08, 1.04, 0.94), (0.42, 0.46, 0.52), 0.95),
    "dusk": ("3b3f7d", "f58a4b", (1.20, 0.62, 0.36), (0.34, 0.28, 0.38), 0.22),
    "night": ("0b1030", "2a3c70", (0.34, 0.42, 0.66), (0.16, 0.20, 0.34), 0.60),
}
CLEARANCE = 7.0  # least height of a flight above the ground, world units
FLIGHT_PLANS = 400  # random flights tried in a world before one is lifted over its hills
VIEW_DISTANCE = {
    "clear": 330.0,
    "cloudy": 240.0,
    "foggy": 105.0,
}  # world units at which haze hides 1 - 1/e


def _rgb(code: str) -> np.ndarray:
    return np.array([int(code[i : i + 2], 16) for i in (0, 2, 4)], np.float32) / 255


def _noise(
    rng: np.random.Generator, slope: float, lowest: float = 1.5, size: int = SIZE
) -> np.ndarray:
    """Torus noise [size, size] with power falling as frequency^-slope, normalised to 0..1."""
    fy, fx = np.fft.fftfreq(size)[:, None] * size, np.fft.rfftfreq(size)[None] * size
    radius = np.hypot(fy, fx)
    amplitude = np.where(radius < lowest, 0, np.maximum(radius, 1e-9) ** -slope)
    phase = rng.uniform(0, 2 * math.pi, radius.shape)
    field = np.fft.irfft2(amplitude * np.exp(1j * phase), s=(size, size))
    low, high = np.percentile(field, (0.5, 99.5))
    noise: np.ndarray = np.clip((field - low) / (high - low), 0, 1).astype(np.float32)
    return noise


def _blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur on the torus, image [N, N, C]."""
    n = image.shape[0]
    fy, fx = np.fft.fftfreq(n)[:, None], np.fft.rfftfreq(n)[None]
    kernel = np.exp(-2 * (math.pi * sigma) ** 2 * (fy**2 + fx**2))[..., None]
    blurred: np.ndarray = np.fft.irfft2(
        np.fft.rfft2(image, axes=(0, 1)) * kernel, s=(n, n), axes=(0, 1)
    ).astype(np.float32)
    return blurred


def _mix(a: np.ndarray, b: np.ndarray, t: np.ndarray | np.float32 | float) -> np.ndarray:
    mixed: np.ndarray = a + (b - a) * t
    return mixed


def _smooth(x: np.ndarray, low: float, high: float) -> np.ndarray:
    t = np.clip((x - low) / (high - low), 0, 1)
    eased: np.ndarray = t * t * (3 - 2 * t)
    return eased


@dataclass(frozen=True)
class Textures:
    """What a world is made of once its prompt and seed are known."""

    height: np.ndarray  # float32 [N, N]: the visible surface, water included
    colour: np.ndarray  # float32 [MIPS, N, N, 3]: lit ground, ever more blurred
    clouds: np.ndarray  # float32 [256, 256]: cover 0..1


class World:
    """One landscape. `render` draws it; everything random comes from `seed`."""

    def __init__(self, seed: int, look: Look, width: int = 192, height: int = 112) -> None:
        rng = np.random.default_rng(seed)
        self.look = Look(
            *(value or str(rng.choice(ATTRIBUTES[name])) for name, value in vars(look).items())
        )
        place, season, time, weather = (str(value) for value in vars(self.look).values())
        self.width, self.height = width, height
        self.ground = PLACES[place]
        self.altitude = self.ground["altitude"] * float(rng.uniform(0.92, 1.08))
        self.sun_azimuth = float(rng.uniform(0, 2 * math.pi))
        zenith, horizon, sun, ambient, self.sun_elevation = SKY[time]
        grey = {"clear": 0.0, "cloudy": 0.55, "foggy": 0.45}[weather]
        self.zenith, self.horizon = _greyed(_rgb(zenith), grey), _greyed(_rgb(horizon), grey)
        self.sunlight = np.array(sun, np.float32) * (1 - 0.75 * grey)
        self.ambient = np.array(ambient, np.float32) * (1 + 0.55 * grey)
        self.view_distance = VIEW_DISTANCE[weather]
        self.cover = {"clear": 0.30, "cloudy": 0.95, "foggy": 0.0}[weather]
        self.textures = self._build(rng, place, season)
        self._flat_colour = self.textures.colour.reshape(-1, 3)

    def _build(self, rng: np.random.Generator, place: str, season: str) -> Textures:
        g = self.ground
        rolling = _noise(rng, g["slope"])
        ridges = 1 - np.abs(2 * _noise(rng, g["slope"] - 0.1) - 1)
        relief = (1 - g["ridged"]) * rolling + g["ridged"] * ridges**1.6 * (0.35 + 0.65 * rolling)
        bare = g["amplitude"] * relief / np.percentile(relief, 99.8)
        if place == "forest":  # crowns
            bare = bare + 1.6 * _smooth(_noise(rng, 1.0, 28), 0.45, 0.75)
        surface = np.maximum(bare, g["water"]).astype(np.float32)
        low, middle, high = (_rgb(code) for code in GROUND[place][season])
        level = (bare - max(g["water"], 0)) / (g["amplitude"] - max(g["water"], 0)) + 0.28 * (
            _noise(rng, 1.2, 6) - 0.5
        )
        colour = _mix(
            _mix(low, middle, _smooth(level, 0.12, 0.45)[..., None]),
            high,
            _smooth(level, 0.52, 0.82)[..., None],
        )
        patches = _noise(rng, 1.0, 10) - 0.5
        colour = colour * (1 + 0.42 * patches[..., None])
        gy, gx = (np.roll(surface, -1, axis) - np.roll(surface, 1, axis) for axis in (0, 1))
        steep = _smooth(np.hypot(gx, gy), 1.6, 4.0)[..., None]
        if place in ("mountains", "islands"):
            colour = _mix(colour, _rgb("6d655c"), 0.7 * steep)
        light = self._light(surface, gx, gy)
        colour = colour * light
        wet = (bare < g["water"])[..., None]
        depth = np.clip((g["water"] - bare) / 9, 0, 1)[..., None]
        shine = _mix(
            _rgb(WATER[season]), 0.5 * self.horizon + 0.2 * self.zenith, np.float32(0.35)
        ) * (self.ambient + 0.6 * self.sunlight)
        colour = np.where(wet, _mix(_mix(colour, shine, 0.55), shine, depth), colour)
        mips = [np.clip(colour, 0, 1).astype(np.float32)] + [
            _blur(colour, 0.55 * 2**i) for i in range(1, MIPS)
        ]
        return Textures(surface, np.stack(mips), _noise(rng, 1.5, 2, 256))

    def _light(self, surface: np.ndarray, gx: np.ndarray, gy: np.ndarray) -> np.ndarray:
        """Sun and sky light [N, N, 3], with soft shadows marched towards the sun."""
        cos, sin = math.cos(self.sun_elevation), math.sin(self.sun_elevation)
        sx, sy = math.sin(self.sun_azimuth), math.cos(self.sun_azimuth)
        facing = (sin - cos * (gx * sx + gy * sy) / 2) / np.sqrt(1 + (gx**2 + gy**2) / 4)
        shadow = np.ones_like(surface)
        for reach in range(2, 64, 4):
            there = np.roll(surface, (-round(sy * reach), -round(sx * reach)), (0, 1))
            shadow = np.minimum(
                shadow,
                1 - _smooth(there - surface - reach * math.tan(self.sun_elevation), 0.0, 3.0),
            )
        light: np.ndarray = (
            self.ambient
            + self.sunlight * (np.clip(facing, 0, None) * (0.15 + 0.85 * shadow))[..., None]
        )
        return light

    def ground_height(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Surface height at positions in world units, bilinear on the torus."""
        x0, y0 = np.floor(x), np.floor(y)
        fx, fy = (x - x0).astype(np.float32), (y - y0).astype(np.float32)
        i, j = x0.astype(np.int32) % SIZE, y0.astype(np.int32) % SIZE
        i1, j1 = (i + 1) % SIZE, (j + 1) % SIZE
        flat = self.textures.height.ravel()
        near = _mix(flat[j * SIZE + i], flat[j * SIZE + i1], fx)
        return _mix(near, _mix(flat[j1 * SIZE + i], flat[j1 * SIZE + i1], fx), fy)

    def render(self, pose: Pose) -> np.ndarray:
        """Return the picture from `pose`: uint8 [height, width, 3].

        Rows are drawn twice as fine and averaged: ridges crawl less, for a third of the cost of
        full supersampling.
        """
        fine = self._draw(pose, self.height * SUPERSAMPLE, focal_length(self.width) * SUPERSAMPLE)
        picture: np.ndarray = fine.reshape(self.height, SUPERSAMPLE, self.width, 3).mean(axis=1)
        return (picture * 255 + 0.5).astype(np.uint8)

    def _draw(self, pose: Pose, h: int, f: float) -> np.ndarray:
        """Draw `h` rows with a vertical focal length of `f` rows: float32 [h, width, 3] in 0..1."""
        w = self.width
        sin, cos = math.sin(pose.heading), math.cos(pose.heading)
        across = ((np.arange(w) + 0.5 - w / 2) / focal_length(w)).astype(np.float32)  # [w]
        # ground direction of each column per unit depth
        ahead = ahead_x, ahead_y = sin + across * cos, cos - across * sin
        far = DEPTHS[:, None]  # [K, 1]
        ground = self.ground_height(pose.x + far * ahead_x, pose.y + far * ahead_y)  # [K, w]
        horizon_row = h / 2 + f * math.tan(pose.pitch)
        rows = horizon_row + f * (pose.z - ground) / far  # [K, w]: screen row of each sample
        top = np.minimum.accumulate(rows, axis=0)
        first = np.clip(np.ceil(top - 0.5), 0, h)  # first pixel row that sample k covers
        cells = (first.astype(np.int64) + np.arange(w) * (h + 1)).ravel()
        counts = np.bincount(cells, minlength=w * (h + 1)).reshape(w, h + 1)
        # [h, w]: index of the first covering sample, K for sky
        hit = len(DEPTHS) - np.cumsum(counts[:, :h], axis=1).T
        picture = self._sky(pose, (horizon_row - np.arange(h) - 0.5) / f, across)
        r, c = np.nonzero(hit < len(DEPTHS))
        picture[r, c] = self._shade(pose, picture[r, c], (r, c), hit[r, c], (rows, top), ahead)
        clipped: np.ndarray = np.clip(picture, 0, 1)
        return clipped

    def _shade(
        self, pose: Pose, sky: np.ndarray, pixel: Pair, k: np.ndarray, screen: Pair, ahead: Pair
    ) -> np.ndarray:
        """Return the ground colour [n, 3] of pixels whose first covering sample is `k`."""
        r, c = pixel
        rows, top = screen
        back = np.maximum(k - 1, 0)
        above, here = top[back, c], rows[k, c]
        part = np.clip((above - r - 0.5) / np.maximum(above - here, 1e-3), 0, 1)
        depth = _mix(DEPTHS[back], DEPTHS[k], part)
        x, y = pose.x + depth * ahead[0][c], pose.y + depth * ahead[1][c]
        level = np.clip(np.log2(depth / 28), 0, MIPS - 1.001)
        mip = np.round(level).astype(np.int32)
        x0, y0 = np.floor(x), np.floor(y)
        fx, fy = (x - x0).astype(np.float32)[:, None], (y - y0).astype(np.float32)[:, None]
        i, j = x0.astype(np.int32) % SIZE, y0.astype(np.int32) % SIZE
        i1, j1, base = (i + 1) % SIZE, (j + 1) % SIZE, mip * SIZE * SIZE
        take = self._flat_colour.take
        near = _mix(take(base + j * SIZE + i, axis=0), take(base + j * SIZE + i1, axis=0), fx)
        far = _mix(take(base + j1 * SIZE + i, axis=0), take(base + j1 * SIZE + i1, axis=0), fx)
        colour = _mix(near, far, fy)
        haze = 1 - np.exp(-((depth / self.view_distance) ** 1.5))
        haze = np.maximum(haze, _smooth(depth, 330, 450))[:, None].astype(np.float32)
        return _mix(colour, _mix(sky, self.horizon, np.float32(0.7)), haze)

    def _sky(self, pose: Pose, tangents: np.ndarray, across: np.ndarray) -> np.ndarray:
        """Draw the sky behind everything: float32 [h, w, 3].

        From each row's tangent of elevation and each column's of azimuth.
        """
        rise = tangents.astype(np.float32)[:, None]  # [h, 1]
        glow = _smooth(rise, -0.02, 0.62)[..., None]
        rows = _mix(self.horizon, self.zenith, glow)
        sky = np.broadcast_to(rows, (len(rise), self.width, 3)).astype(np.float32)
        azimuth = pose.heading + np.arctan(across)[None]  # [1, w]
        up = np.maximum(rise, 0.0)
        if self.cover:
            far = 1 / (up + 0.16)
            u, v = far * np.sin(azimuth) * 16 + 64, far * np.cos(azimuth) * 16 + 64
            cloud = _bilinear(self.textures.clouds, u, v)
            amount = self.cover * _smooth(cloud, 0.45, 0.80) * _smooth(up, 0.03, 0.22)
            white = np.clip(self.ambient + 0.62 * self.sunlight, 0, 1)
            sky = _mix(sky, white, 0.85 * amount[..., None])
        turn = np.mod(azimuth - self.sun_azimuth + math.pi, 2 * math.pi) - math.pi
        apart = turn**2 + (np.arctan(rise) - min(self.sun_elevation, 0.34)) ** 2
        shine = 0.9 * np.exp(-apart / 0.004) + 0.35 * np.exp(-apart / 0.12)
        shine = (shine * (0.25 + 0.75 * (self.cover == 0.30)))[..., None]
        sunny: np.ndarray = sky + shine * self.sunlight * (0.45 if self.cover == 0 else 0.8)
        return sunny


def _greyed(colour: np.ndarray, amount: float) -> np.ndarray:
    return _mix(colour, np.full(3, colour.mean(), np.float32) * 1.02, np.float32(amount))


def _bilinear(texture: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    n = texture.shape[0]
    u0, v0 = np.floor(u), np.floor(v)
    fu, fv = (u - u0).astype(np.float32), (v - v0).astype(np.float32)
    i, j = u0.astype(np.int32) % n, v0.astype(np.int32) % n
    i1, j1 = (i + 1) % n, (j + 1) % n
    near = _mix(texture[j, i], texture[j, i1], fu)
    return _mix(near, _mix(texture[j1, i], texture[j1, i1], fu), fv)


@dataclass(frozen=True)
class Clip:
    """A flight.

    frames uint8 [1 + 4n, H, W, 3]; the pose of frame 0 and of the last frame of each block [n + 1].
    """

    frames: np.ndarray
    poses: tuple[Pose, ...]
    look: Look


def random_velocities(rng: np.random.Generator, blocks: int) -> list[Velocity]:
    """Draw a velocity per block: each lasts for a while, then eases into the next."""
    keys: list[Velocity] = []
    plan: list[Velocity] = []
    while len(plan) < blocks:
        calm = rng.random() < 0.35
        target = Velocity(
            forward=LIMITS.forward
            * float(rng.uniform(0.25, 1.0))
            * (1 if rng.random() < 0.9 else -0.3)
            * (rng.random() < 0.93),
            strafe=LIMITS.strafe * float(rng.uniform(-1, 1)) * (rng.random() < 0.35),
            yaw=0.0 if calm else LIMITS.yaw * float(rng.uniform(-1, 1)),
            pitch=LIMITS.pitch * float(rng.uniform(-1, 1)) * (rng.random() < 0.35),
        )
        keys.append(target)
        last = keys[-2] if len(keys) > 1 else target
        plan += [_blend(last, target, 0.5)] + [target] * int(rng.integers(3, 14))
    return plan[:blocks]


def _blend(a: Velocity, b: Velocity, t: float) -> Velocity:
    pairs = zip(vars(a).values(), vars(b).values(), strict=True)
    return Velocity(*(x + (y - x) * t for x, y in pairs))


def start_pose(world: World, rng: np.random.Generator) -> Pose:
    """Draw a pose above the ground."""
    x, y, heading = (float(rng.uniform(0, high)) for high in (SIZE, SIZE, 2 * math.pi))
    return Pose(x, y, world.altitude, heading, float(rng.uniform(-0.06, 0.04)))


def headroom(world: World, poses: list[Pose]) -> float:
    """Return the camera's smallest height above the ground, over a flight at one altitude.

    The ground is that below it and just before it.
    """
    half = FIELD_OF_VIEW / 2
    reach = np.array([0.0, 7.0, 14.0])[:, None, None]
    x, y, heading = (np.array([getattr(p, name) for p in poses]) for name in ("x", "y", "heading"))
    fan = heading[None, None] + np.array([-half, 0, half])[None, :, None]  # [1, 3, n]
    ground = world.ground_height(x + reach * np.sin(fan), y + reach * np.cos(fan))
    return poses[0].z - float(ground.max())


def fly(
    world: World, rng: np.random.Generator, blocks: int, fps: int = 24, stride: int = 4
) -> Clip:
    """Render one random flight of 1 + stride * blocks frames that never touches the ground."""
    missing = 0.0
    for _ in range(FLIGHT_PLANS):
        poses = [start_pose(world, rng)]
        for velocity in random_velocities(rng, blocks):
            for _ in range(stride):
                poses.append(poses[-1].moved(velocity, 1 / fps))
        missing = CLEARANCE - headroom(world, poses)
        if missing < 0:
            break
    else:  # a world without an open flight: fly this one higher
        poses = [dataclasses.replace(pose, z=pose.z + missing) for pose in poses]
    frames = np.stack([world.render(pose) for pose in poses])
    return Clip(frames, tuple(poses[::stride]), world.look)
