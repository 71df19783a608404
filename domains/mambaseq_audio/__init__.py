"""Sound: 8-bit mu-law samples, clips with a condition, long recordings, wav files and spectrograms."""

from __future__ import annotations

from mambaseq.domain import Domain

_BLOCKS = {"s4": "S4+MLP", "mamba": "Mamba", "attention": "attention"}
_FIGURE_10 = {
    "s4": "S4+MLP",
    "real": "Mamba with real states",
    "complex": "Mamba with complex states",
    "constant": "complex states, B and C constant",
    "lti": "Mamba-S4, which is time-invariant",
    "center_real": "Mamba with real states in the center, Mamba-S4 outside",
    "center_complex": "Mamba with complex states in the center, Mamba-S4 outside",
    "center_constant": "complex states, B and C constant, in the center, Mamba-S4 outside",
}

domain = Domain(
    name="audio",
    summary="waveforms sample by sample: spoken digits with a condition, long recordings",
    tokenizers={
        "mulaw": ("mambaseq_audio.mulaw:MuLaw", "8-bit mu-law levels at fixed full scale"),
        "codes": (
            "mambaseq_audio.codes:CodeFrames",
            "frames of a neural codec's codes, books shifted by their numbers",
        ),
        "linear": ("mambaseq_audio.linear:Linear", "8-bit or 16-bit levels in even steps"),
    },
    encoders={"mel": ("mambaseq_audio.mel:MelEncoder", "frames of a mel spectrogram, for classifiers")},
    backbones={
        "convolutions": ("mambaseq_audio.mel:ConvolutionStack", "a small residual network over time, both ways")
    },
    datasets={
        "clips": ("mambaseq_audio.clips:ClipData", "short clips, conditioned on what their file names say"),
        "codes": (
            "mambaseq_audio.code_data:CodeData",
            "streams of a neural codec's codes (.npy), several books a frame",
        ),
        "labelled": ("mambaseq_audio.labelled:LabelledClips", "short clips with a label each, from their file names"),
        "waveform": ("mambaseq_audio.waveform:WaveformData", "windows of long recordings, split by time"),
    },
    readers={
        "audio": ("mambaseq_audio.io:read_audio", "wav, flac, ogg and other formats of libsndfile"),
        "codes": ("mambaseq_audio.code_files:read_codes", "a neural codec's codes, .npy"),
    },
    writers={
        "wav": ("mambaseq_audio.speaking:wav", "16-bit wav or flac while it is generated, one file for each sequence"),
        "codes": ("mambaseq_audio.code_files:write_codes", "a neural codec's codes, one .npy for each sequence"),
    },
    callbacks={
        "listening": (
            "mambaseq_audio.listening:Listening",
            "clips every so many steps beside real ones, in TensorBoard and on the run's page",
        )
    },
    configs={
        "digits": ("mambaseq:configs/audio/digits.yaml", "spoken digits by digit and speaker, on a GPU"),
        "codec": ("mambaseq:configs/audio/codec.yaml", "codes of a neural codec, several books a frame"),
        "digits_16bit": (
            "mambaseq:configs/audio/digits_16bit.yaml",
            "the same with samples of 16 bits, a coarse and a fine byte, on a GPU",
        ),
        "sashimi": ("mambaseq:configs/audio/sashimi.yaml", "the same at three resolutions of time, on a GPU"),
        "sc09": ("mambaseq:configs/audio/sc09.yaml", "SC09 as in the Mamba paper, 6.1 M; you bring the clips"),
        "sc09_large": ("mambaseq:configs/audio/sc09_large.yaml", "the same, 24.3 M"),
        "sc09_sashimi": ("mambaseq:configs/audio/sc09_sashimi.yaml", "the same with SaShiMi's S4+MLP, 5.8 M"),
        **{
            f"table5_{outer}_{center}": (
                f"mambaseq:configs/audio/table5_{outer}_{center}.yaml",
                f"SC09, Mamba paper, Table 5: {_BLOCKS[outer]} outside, {_BLOCKS[center]} in the center",
            )
            for outer, center in (("s4", "attention"), ("s4", "mamba"), ("mamba", "attention"), ("mamba", "s4"))
        },
        "youtubemix": (
            "mambaseq:configs/audio/youtubemix.yaml",
            "YouTubeMix, Mamba paper, Figure 7: Mamba, 3.5 M; you bring the piano",
        ),
        "youtubemix_s4": ("mambaseq:configs/audio/youtubemix_s4.yaml", "the same with SaShiMi's S4+MLP"),
        **{
            f"figure10_{name}": (
                f"mambaseq:configs/audio/figure10_{name}.yaml",
                f"YouTubeMix, Mamba paper, Figure 10: {summary}",
            )
            for name, summary in _FIGURE_10.items()
        },
        "digit_classifier": ("mambaseq:configs/audio/digit_classifier.yaml", "which digit is spoken, minutes on a CPU"),
        "mamba3": ("mambaseq:configs/audio/mamba3.yaml", "digits with Mamba-3 of several inputs a head, on a GPU"),
        "gated_delta": ("mambaseq:configs/audio/gated_delta.yaml", "digits with the gated delta rule, on a GPU"),
        "kda": ("mambaseq:configs/audio/kda.yaml", "digits with Kimi Delta Attention, on a GPU"),
        "gla": ("mambaseq:configs/audio/gla.yaml", "digits with gated linear attention, on a GPU"),
        "demo": ("mambaseq:configs/audio/demo.yaml", "spoken digits with a condition, minutes on a CPU"),
    },
    commands={
        "compare": (
            "mambaseq_audio.commands:compare",
            "a page on which runs are compared by ear: RUN [RUN ...] --out PAGE.html [--blind]",
        ),
        "score": (
            "mambaseq_audio.commands:score",
            "FID, inception scores and AM of generated clips: --generated DIR --real DIR --classifier RUN",
        ),
        "frechet": (
            "mambaseq_audio.commands:frechet",
            "Fréchet audio distance of embeddings that you bring: --generated FILE.npy --real FILE.npy",
        ),
    },
    recipes={
        "spoken_digits": (
            "mambaseq_audio.recipes.spoken_digits:recipe",
            "SaShiMi's contest on spoken digits: U-Nets and stacks, selective, time-invariant and S4, at equal time",
        ),
        "audio_context": (
            "mambaseq_audio.recipes.audio_context:recipe",
            "Mamba's ablation on long recordings: selective or time-invariant, bits a byte by context",
        ),
        "sc09": ("mambaseq_audio.recipes.sc09:recipe", "Mamba paper, Tables 4 and 5: speech on SC09, likelihoods"),
        "youtubemix": (
            "mambaseq_audio.recipes.youtubemix:recipe",
            "Mamba paper, Figures 7 and 10: piano by context, selective and LTI",
        ),
    },
    reports={"demo": ("mambaseq_audio.report:report", "bits a sample next to count models, and sounds")},
)
