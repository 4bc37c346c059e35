"""The networks of the zoo: what there is, how each is built, and what it is run on.

    python benchmarks/zoo_networks.py

compares the lists below with the installed torchvision and timm and prints what differs. They are
committed so that a report names the same networks wherever it is made; `installed_torchvision` and
`smallest_timm` derive them again. The list of Ultralytics' model files is a choice.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the process that only starts others and writes reports needs no torch
    from torch import Tensor, nn

_BUILDERS = {
    "classification": """
        alexnet convnext_base convnext_large convnext_small convnext_tiny densenet121
        densenet161 densenet169 densenet201 efficientnet_b0 efficientnet_b1 efficientnet_b2
        efficientnet_b3 efficientnet_b4 efficientnet_b5 efficientnet_b6 efficientnet_b7
        efficientnet_v2_l efficientnet_v2_m efficientnet_v2_s googlenet inception_v3
        maxvit_t mnasnet0_5 mnasnet0_75 mnasnet1_0 mnasnet1_3 mobilenet_v2
        mobilenet_v3_large mobilenet_v3_small regnet_x_16gf regnet_x_1_6gf regnet_x_32gf
        regnet_x_3_2gf regnet_x_400mf regnet_x_800mf regnet_x_8gf regnet_y_128gf
        regnet_y_16gf regnet_y_1_6gf regnet_y_32gf regnet_y_3_2gf regnet_y_400mf
        regnet_y_800mf regnet_y_8gf resnet101 resnet152 resnet18 resnet34 resnet50
        resnext101_32x8d resnext101_64x4d resnext50_32x4d shufflenet_v2_x0_5
        shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0 squeezenet1_0 squeezenet1_1
        swin_b swin_s swin_t swin_v2_b swin_v2_s swin_v2_t vgg11 vgg11_bn vgg13 vgg13_bn
        vgg16 vgg16_bn vgg19 vgg19_bn vit_b_16 vit_b_32 vit_h_14 vit_l_16 vit_l_32
        wide_resnet101_2 wide_resnet50_2
    """,
    "segmentation": """
        deeplabv3_mobilenet_v3_large deeplabv3_resnet101 deeplabv3_resnet50 fcn_resnet101
        fcn_resnet50 lraspp_mobilenet_v3_large
    """,
    "detection": """
        fasterrcnn_mobilenet_v3_large_320_fpn fasterrcnn_mobilenet_v3_large_fpn
        fasterrcnn_resnet50_fpn fasterrcnn_resnet50_fpn_v2 fcos_resnet50_fpn
        keypointrcnn_resnet50_fpn maskrcnn_resnet50_fpn maskrcnn_resnet50_fpn_v2
        retinanet_resnet50_fpn retinanet_resnet50_fpn_v2 ssd300_vgg16
        ssdlite320_mobilenet_v3_large
    """,
    "video": """
        mc3_18 mvit_v1_b mvit_v2_s r2plus1d_18 r3d_18 s3d swin3d_b swin3d_s swin3d_t
    """,
    "optical_flow": """
        raft_large raft_small
    """,
}
TORCHVISION: dict[str, list[str]] = {task: text.split() for task, text in _BUILDERS.items()}
"""Task -> every torchvision builder, the quantizable ones left out."""

TIMM: dict[str, str] = {
    "beit": "beit_base_patch16_224",
    "byoanet": "halonet_h1",
    "byobnet": "mobileone_s1",
    "cait": "cait_xxs24_224",
    "coat": "coat_tiny",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32",
    "convnext": "convnext_zepto_rms",
    "cpubone": "cpubone_nano",
    "crossvit": "crossvit_tiny_240",
    "csatv2": "csatv2",
    "cspnet": "cs3darknet_focus_s",
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "deepseek_vit": "deepseek_vit_412m",
    "deit": "deit_tiny_patch16_224",
    "densenet": "densenet121",
    "dla": "dla46x_c",
    "dpn": "dpn48b",
    "edgenext": "edgenext_xx_small",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "mobilenetv2_035",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "eva": "vit_tiny_patch16_dinov3_qkvb",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny",
    "gemma4_vit": "gemma4_vit_167m",
    "ghostnet": "ghostnet_050",
    "hardcorenas": "hardcorenas_b",
    "hgnet": "hgnetv2_b0",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "sam2_hiera_tiny",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s",
    "lowformer": "lowformer_b0",
    "mambaout": "mambaout_femto",
    "maxxvit": "maxvit_pico_rw_256",
    "metaformer": "poolformerv2_s12",
    "mlp_mixer": "gmlp_ti16_224",
    "mobilenetv3": "mobilenetv3_small_050",
    "mobilenetv5": "mobilenetv5_base",
    "mobilevit": "mobilevit_xxs",
    "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_parfac_gap",
    "nasnet": "nasnetalarge",
    "nest": "nest_tiny",
    "nextvit": "nextvit_small",
    "nfnet": "nf_regnet_b0",
    "pit": "pit_ti_224",
    "pnasnet": "pnasnet5large",
    "pvt_v2": "pvt_v2_b0",
    "qwen3_vit": "qwen3_vit_88m",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m1",
    "res2net": "res2next50",
    "resnest": "resnest14d",
    "resnet": "resnet10t",
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100",
    "selecsls": "selecsls42",
    "senet": "legacy_seresnet18",
    "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window8_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_legacy_patch16_224",
    "tresnet": "tresnet_m",
    "twins": "twins_svt_small",
    "vgg": "vgg11",
    "visformer": "visformer_tiny",
    "vision_transformer": "vit_tiny_patch16_224",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_relpos": "vit_srelpos_small_patch16_224",
    "vision_transformer_sam": "samvit_base_patch16_224",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw",
    "xception": "legacy_xception",
    "xception_aligned": "xception41p",
    "xcit": "xcit_nano_12_p8_224",
}
"""timm model file -> its member with the fewest parameters, timm's own `test_*` miniatures and
deprecated names left out."""

_FILES = {
    "detect": """
        yolov3-tiny yolov3-spp yolov5n yolov6n yolov8n yolov8n-p2 yolov8n-p6 yolov8n-ghost
        yolov8n-rtdetr yolov8s-world yolov8s-worldv2 yolov9t yolov9e yolov10n yolov10s yolo11n
        yolo12n yolo26n yoloe-26n rtdetr-l rtdetr-resnet50
    """,
    "segment": "yolov8n-seg yolov9c-seg yolo11n-seg yolo12n-seg yolo26n-seg yolo26n-sem",
    "depth": "yolo26n-depth",
    "pose": "yolov8n-pose yolo11n-pose yolo12n-pose yolo26n-pose",
    "obb": "yolov8n-obb yolo11n-obb yolo12n-obb yolo26n-obb",
    "classify": "yolov8n-cls yolov8-cls-resnet50 yolo11n-cls yolo12n-cls yolo26n-cls",
}
ULTRALYTICS: dict[str, list[str]] = {task: text.split() for task, text in _FILES.items()}
"""Task -> model files of Ultralytics: of each generation the smallest, and what differs from it."""

SMALL_IMAGE = {"min_size": 320, "max_size": 320}
"""FPN detectors would enlarge any image to 800 pixels; the networks are the same."""
SMALL_RCNN = {
    "box_score_thresh": 0.0,
    "rpn_post_nms_top_n_test": 200,
    "box_detections_per_img": 20,
    **SMALL_IMAGE,
}
"""Proposals and detections in about the proportion to the pixels that 1000 and 100 have to 800x800;
as many as by default would leave nearly all MACs in the heads."""

BUILDER_ARGUMENTS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
    "fasterrcnn_mobilenet_v3_large_320_fpn": {"box_score_thresh": 0.0},
    "fasterrcnn_mobilenet_v3_large_fpn": SMALL_RCNN,
    "fasterrcnn_resnet50_fpn": SMALL_RCNN,
    "fasterrcnn_resnet50_fpn_v2": SMALL_RCNN,
    "fcos_resnet50_fpn": {"score_thresh": 0.0, **SMALL_IMAGE},
    "keypointrcnn_resnet50_fpn": SMALL_RCNN,
    "maskrcnn_resnet50_fpn": SMALL_RCNN,
    "maskrcnn_resnet50_fpn_v2": SMALL_RCNN,
    "retinanet_resnet50_fpn": {"score_thresh": 0.0, **SMALL_IMAGE},
    "retinanet_resnet50_fpn_v2": {"score_thresh": 0.0, **SMALL_IMAGE},
    "ssd300_vgg16": {"score_thresh": 0.0},
    "ssdlite320_mobilenet_v3_large": {"score_thresh": 0.0},
}
"""Score thresholds of 0: a random detector would give no boxes, and nothing would be compared."""

IMAGE_SIZES = {
    "inception_v3": 299,
    "deepseek_vit_412m": 126,
    "gemma4_vit_167m": 240,
    "qwen3_vit_88m": 256,
}
"""Other than 224 pixels in torchvision and the network's own default in timm. The last three are
made for 546 to 768 pixels, of which a few passes would take all the time there is."""
CLIP_SIZES = {
    "mc3_18": (16, 112, 112),
    "r2plus1d_18": (16, 112, 112),
    "r3d_18": (16, 112, 112),
    "mvit_v1_b": (16, 224, 224),
    "mvit_v2_s": (16, 224, 224),
    "s3d": (16, 224, 224),
    "swin3d_b": (16, 224, 224),
    "swin3d_s": (16, 224, 224),
    "swin3d_t": (16, 224, 224),
}
"""Frames, height, width of the clips that a video network is run on; torchvision's own sizes."""

CLASSES = {"classification": 1000, "segmentation": 21, "detection": 91, "video": 400}


@dataclass(frozen=True)
class Network:
    """One network of the zoo. `family` is the library's task, or timm's model file."""

    name: str
    library: str
    family: str

    @property
    def key(self) -> str:
        """The name that is unique over all libraries."""
        return f"{self.library}:{self.name}"

    @property
    def task(self) -> str:
        """What kind of output it gives."""
        return "classification" if self.library == "timm" else self.family


def networks() -> list[Network]:
    """Every network of the zoo."""
    vision = [
        Network(name, "torchvision", task) for task, names in TORCHVISION.items() for name in names
    ]
    yolo = [
        Network(name, "ultralytics", task) for task, names in ULTRALYTICS.items() for name in names
    ]
    return [*vision, *(Network(name, "timm", family) for family, name in TIMM.items()), *yolo]


def find(key: str) -> Network:
    """The network with this key.

    Raises:
        KeyError: there is none.
    """
    return {network.key: network for network in networks()}[key]


def build(network: Network) -> nn.Module:
    """The network with random weights drawn with seed 0, scales and statistics included; eval."""
    import torch

    torch.manual_seed(0)
    if network.library == "timm":
        import timm

        net = timm.create_model(network.name, pretrained=False)
    elif network.library == "ultralytics":
        import ultralytics

        made = ultralytics.RTDETR if "rtdetr" in network.name else ultralytics.YOLO
        net = made(f"{network.name}.yaml").model
    else:
        import torchvision

        arguments = dict(BUILDER_ARGUMENTS.get(network.name, {}))
        if network.task in ("segmentation", "detection"):
            arguments["weights_backbone"] = None
        net = torchvision.models.get_model(network.name, weights=None, **arguments)
    randomise(net.eval())
    settle(net, example_inputs(network, net))
    return net


def randomise(net: nn.Module, seed: int = 0) -> None:
    """Replace constant parameters by mild random values.

    A fresh network's norms compute x * 1 + 0, its layer scales are 1e-6 and some gates are 0, all
    of which hide a channel that was taken from the wrong place.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)

    with torch.no_grad():
        for parameter in net.parameters():
            _spread(parameter, generator)


def settle(net: nn.Module, inputs: tuple[Any, ...], seed: int = 0) -> None:
    """Set every batch norm's statistics, in the order of one pass, near to those of its input.

    With statistics that do not fit, the signal dies out on its way through some networks: a
    detector then gives all its boxes exactly the same score, and their order means nothing.
    """
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    generator = torch.Generator().manual_seed(seed)

    def fit(norm: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        values = arguments[0].transpose(0, 1).flatten(1) if arguments[0].dim() > 1 else None
        if values is None or norm.running_var is None or values.shape[1] < 2:
            return
        noise = torch.empty(2, values.shape[0]).uniform_(-0.25, 0.25, generator=generator)
        variance = values.var(1).clamp(min=1e-4)
        norm.running_mean.copy_(values.mean(1) + noise[0] * variance.sqrt())
        norm.running_var.copy_(variance * (1 + noise[1]))

    norms = [module for module in net.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return
    handles = [norm.register_forward_pre_hook(fit) for norm in norms]
    with torch.no_grad():
        net(*inputs)
    for handle in handles:
        handle.remove()


def _spread(parameter: Tensor, generator: Any) -> None:
    """Constants c become: about 0 for 0, 0.1 to 0.2 for |c| < 0.1, c within 25 % otherwise."""
    import torch

    if not parameter.is_floating_point() or not parameter.numel():
        return
    low, high = (float(bound) for bound in parameter.aminmax())
    if low != high:
        return
    noise = torch.empty(parameter.shape).uniform_(-1, 1, generator=generator)
    if low == 0:
        parameter.copy_(0.05 * noise)
    elif abs(low) < 0.1:
        parameter.copy_(0.15 + 0.05 * noise)
    else:
        parameter.copy_(low * (1 + 0.25 * noise))


def example_inputs(network: Network, net: nn.Module) -> tuple[Any, ...]:
    """The positional arguments of one forward pass, one image or clip where that is possible."""
    import torch

    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if network.library == "ultralytics":
        return (torch.rand((1, 3, 320, 320), generator=generator),)
    if network.task == "detection":
        return ([torch.rand((3, 320, 320), generator=generator)],)
    if network.task == "optical_flow":
        return (draw(1, 3, 128, 128), draw(1, 3, 128, 128))
    if network.task == "video":
        return (draw(1, 3, *CLIP_SIZES[network.name]),)
    if network.library == "timm":
        channels, default, _ = net.default_cfg["input_size"]  # type: ignore[index,operator]
        size = IMAGE_SIZES.get(network.name, default)
        return (draw(1, channels, size, size),)
    size = IMAGE_SIZES.get(network.name, 224)
    return (draw(1, 3, size, size),)


def installed_torchvision() -> dict[str, list[str]]:
    """What `TORCHVISION` should be for the installed torchvision."""
    from torchvision import models

    modules = {
        "classification": models,
        "segmentation": models.segmentation,
        "detection": models.detection,
        "video": models.video,
        "optical_flow": models.optical_flow,
    }
    return {task: models.list_models(module) for task, module in modules.items()}


def smallest_timm() -> dict[str, str]:
    """What `TIMM` should be for the installed timm; builds all of it without memory, minutes."""
    import timm

    smallest = {}
    for file in timm.list_modules():
        names = [name for name in timm.list_models(module=file) if not name.startswith("test_")]
        sizes = {name: size for name in names if (size := _parameters(name)) is not None}
        smallest[file] = min(sizes, key=lambda name: (sizes[name], len(name), name))
    return smallest


def _parameters(name: str) -> int | None:
    """Parameters of a timm network, None where it cannot be built on the meta device."""
    import timm
    import torch

    try:
        with torch.device("meta"):
            net = timm.create_model(name, pretrained=False)
    except (RuntimeError, ValueError, NotImplementedError):
        return None
    return sum(parameter.numel() for parameter in net.parameters())


def _differences(listed: Sequence[str], installed: Sequence[str]) -> list[str]:
    gone = [f"- {name}" for name in sorted(set(listed) - set(installed))]
    return gone + [f"+ {name}" for name in sorted(set(installed) - set(listed))]


def main() -> None:
    """Print what the lists lack (+) and what the installed libraries lack (-)."""
    warnings.simplefilter("ignore")
    lines = []
    for task, names in installed_torchvision().items():
        lines += _differences(TORCHVISION[task], names)
    listed = [f"{file}: {name}" for file, name in TIMM.items()]
    lines += _differences(listed, [f"{file}: {name}" for file, name in smallest_timm().items()])
    print("\n".join(lines) or "the lists are those of the installed libraries")


if __name__ == "__main__":
    main()
