"""Speed beside the peers, correctness first: the work of `mambaseq bench ops|block|train|decode`.

`--json FILE` writes one object (decode: after every row):

    bench, scale         what ran: "ops", "block", "train" or "decode", at "full", "small" or "tiny" shapes
    device, gpu          the device's type and name (the processor's if there is no GPU)
    torch, mambaseq      versions
    date                 of the run's end, ISO 8601, UTC
    rows                 a list of objects, one for each contender and shape:
        op               what was measured: "selective_scan", "delta_rule, kda" (an op as a mixer asks for it), "scan,
                         attention, convolution", "block", "train step", "train step of gla", ...
        shape            names to integers: batch, length, channels, ...
        contender        "mambaseq" or the peer
        backend          what ran inside it, "" if there is no choice
        status           "ok"; "wrong" (its results are not the reference's, so there are no times), "absent" (not
                         installed), "oom" (out of memory), "failed" (it raised), "skipped" (it would take too long)
        note             the reason, unless status is "ok"; otherwise empty or how it was run
        error            largest relative error of its check, null if there was none
        *_ms             median milliseconds of a call: forward_ms, backward_ms, both_ms (forward and backward),
                         step_ms, prefill_ms, total_ms; host_ms: how long the host is busy with a call of both
        *_mib, *_gib     most memory allocated at a time, beyond what was allocated before
        *tokens_per_s    throughput
        parameters       of train: how many the model has
        floor_*          of decode: what the device could do at best (see `decode` and `floors`); *_of_floor_percent:
                         how near the row is to it
    ratios               a list of objects: op, shape, peer, value (the key in the rows), ratio; above 1 mambaseq is
                         ahead. `shape` is null for geometric means, which have `over` ("all", "batch > 1", "batch 1")

Keys of a row that were not measured are left out.
"""
