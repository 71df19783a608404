// The kernel: all steps of the sequences, phase after phase; see stretch_common.cu.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    stretch(const Phase *phases, const Phase *strides, int n_phases, int n_steps, int batch, int groups, u32 steps_before,
            const float *embedding, const float *conditions, int d_model, const float *logits, i64 logits_stride,
            int logits_turn, int vocabulary, const double *temperature, const double *uniforms, const i64 *first,
            i64 *tokens, const i64 *counts, const i64 *pools, int n_pools, int *failed) {
    extern __shared__ __align__(16) unsigned char memory[];
    float *const vectors = (float *)memory;  // two by turns: a warp may begin a phase when others have not ended the one before
    int *const now = (int *)(vectors + 2 * SEQUENCES * ROOM);  // the sequences' tokens; room for 8
    Phase *const program = (Phase *)(now + 8), *const far = program + n_phases;
    const int blocks = gridDim.x / groups, group = blockIdx.x / blocks, block = blockIdx.x % blocks;
    const int warp = threadIdx.x / 32, worker = warp * blocks + block, workers = WARPS * blocks;
    const double inverse = 1. / *temperature;
    int count[POOLS + 1], size[POOLS + 1], turn = 0;
#pragma unroll
    for (int i = 0; i < POOLS; i++) size[i] = i < n_pools ? (int)pools[i] : 0;
    bool all_finite = true;
    for (int begin = group * SEQUENCES; begin < batch; begin += groups * SEQUENCES) {
        const int last = min(SEQUENCES, batch - begin) - 1, place = threadIdx.x % 32 / LANES;
        const Lane lane = {min(place, last), (int)threadIdx.x % LANES, place <= last};
        const bool tells = lane.writes && lane.place == 0;
        __syncthreads();  // no thread reads the program of the sequences before
        for (int i = threadIdx.x; i < n_phases * (int)(sizeof(Phase) / 8); i += THREADS) {
            const i64 stride = ((const i64 *)strides)[i];
            ((i64 *)program)[i] = ((const i64 *)phases)[i] + begin * stride, ((i64 *)far)[i] = stride;
        }
        if (threadIdx.x < SEQUENCES) now[threadIdx.x] = (int)first[begin + min((int)threadIdx.x, last)];
        __syncthreads();
#pragma unroll
        for (int i = 0; i < POOLS; i++) count[i] = i < n_pools ? (int)counts[i] : 0;
        auto slot_of = [&](const Phase &p) {
            int slot = 0;
#pragma unroll
            for (int i = 0; i < POOLS; i++) slot = p.pool == i ? count[i] : slot;
            return slot;
        };
        Ahead ahead;
        fetch(ahead, program[0], far[0], lane, worker, 0);
        for (int step = 0; step < n_steps; step++) {
            const u32 current = steps_before + step + 1;
            // so many pools are whole with this position, one after the other
            int whole = 0;
#pragma unroll
            for (int i = 0; i < POOLS; i++)
                if (whole == i && i < n_pools && count[i] + 1 == size[i]) whole = i + 1;
            for (int k = 0; k < n_phases;) {
                const Phase &p = program[k], &apart = far[k];
                const int rows = (int)p.rows, cols = (int)p.cols, slot = slot_of(p);
                const bool embeds = p.flags & EMBEDS;
                int done = -1;  // the row whose states are still to be kept
                if (block < rows || (embeds && block < cols)) {
                    float *const vector = vectors + turn * SEQUENCES * ROOM;
                    turn ^= 1;
                    if (worker < rows) prepare(ahead, p);
                    int apart_steps = 1;  // of two positions of the phase's pool
#pragma unroll
                    for (int i = 0; i < POOLS; i++)
                        if (i < p.pool) apart_steps *= size[i];
                    // what was told so many steps ago; before this kernel began it was told for certain
                    auto past = [&](int steps) { return steps <= step ? current - steps : 0; };
                    if (embeds) {
                        const int sequence = threadIdx.x / TEAM, own = begin + min(sequence, last);
                        if (sequence < SEQUENCES)
                            for (int at = threadIdx.x % TEAM; at < cols; at += TEAM)
                                vector[sequence * ROOM + at] = embedding[(i64)now[sequence] * d_model + at] +
                                                               (conditions ? conditions[(i64)own * d_model + at] : 0.f);
                    } else if (POOLED && IS(LINEAR) && p.pool >= 0) {
                        const int width = cols / (slot + 1);
                        stage(vector, p.in, (i64)apart.in, last, cols,
                              [&](int at) { return past((slot - at / width) * apart_steps); });
                    } else {
                        stage(vector, p.in, (i64)apart.in, last, IS(SCAN) ? (int)p.held_cols : cols,
                              [&](int) { return current; });
                    }
                    if (POOLED && IS(OUT) && p.held)
                        stage(vector + cols, p.held, (i64)apart.held, last, (int)p.held_cols,
                              [&](int) { return past((slot + 1) * apart_steps); });
                    __syncthreads();
                    if (embeds && tells)
                        for (int at = worker; at < cols; at += workers)
                            tell(OF(residual, lane.sequence), at, vector[lane.sequence * ROOM + at], current);
                    const float share = 1.f / cols, eps = __int_as_float((int)p.eps);
                    const int pieces = (cols + 127) / 128;
                    float *const out = p.out + (k + 1 == n_phases ? (current & 1) * (i64)logits_turn * 2 : 0);
                    for (int row = worker; row < rows; row += workers) {
                        if (row != worker) {
                            keep(ahead, p, apart, lane, done);
                            fetch(ahead, p, apart, lane, row, slot);
                            prepare(ahead, p);
                        }
                        done = row;
                        float v = 0.f, other = 0.f, squares = 0.f;
                        if (IS(LTI)) dots<1, SQUARES>(pieces, vector, cols, ahead.weight, ahead.other, v, other, squares);
                        else if (p.normed || has_other(p))
                            dots<1, ALL>(pieces, vector, cols, ahead.weight, ahead.other, v, other, squares);
                        else dots<1, ONE>(pieces, vector, cols, ahead.weight, ahead.other, v, other, squares);
                        // a norm's weight is in the rows'
                        const float scale = p.normed ? rsqrtf(fmaf(squares, share, eps)) : 1.f;
                        v = fmaf(scale, v, ahead.bias), other = fmaf(scale, other, ahead.other_bias);
                        if (IS(OUT)) {
                            float given = 0.f;
                            if (POOLED && p.held) {
                                const int n = (int)p.held_cols;
#if SEQUENCES == 1
                                const Vec &up = ahead.up;
#else
                                const Vec up = part_of(row_up(p, row, slot), n);
#endif
                                float unused;
                                dots<1, ONE>((n + 127) / 128, vector + cols, n, up, up, given, unused, unused);
                            }
                            v = HAS(GLU) ? fmaf(v, 1.f / (1.f + __expf(-other)), ahead.input) : v + ahead.input;
                            if (POOLED && tells && p.window) tell(OF(window, lane.sequence), slot * rows + row, v, current);
                            v += given;
                            if (POOLED && tells && p.copy) tell(OF(copy, lane.sequence), row, v, current);
                        } else if (has_conv(p)) {
                            ahead.v = v, ahead.u = v = silu(fmaf(ahead.last_tap, v, ahead.from_past));
                            if (IS(MAMBA)) {
                                v = fmaf(ahead.D + ahead.from_input, v, ahead.from_states) * silu(other);
                            } else {
                                if (tells) tell(OF(copy, lane.sequence), row, silu(other), current);
                            }
                        } else if (IS(SCAN)) {
                            select(ahead, p, lane, vector + lane.sequence * ROOM, softplus(v));
                            ahead.u = ahead.input;
                            v = fmaf(ahead.D, ahead.input, read_out(ahead, ahead.input)) * ahead.gate;
                        } else if (IS(LTI)) {
                            ahead.u = scale * vector[lane.sequence * ROOM + row];
                            v = gelu(fmaf(ahead.D + ahead.from_input, ahead.u, ahead.from_states));
                        } else if (IS(GATED)) {
                            v = HAS(SWIGLU) ? silu(v) * other : gelu(v);
                        }
                        if (tells) tell(of(out, (i64)apart.out, lane.sequence), row, v, current);
                    }
                }
                if (done >= 0) keep(ahead, p, apart, lane, done);
                k++;
                while (k < n_phases && program[k].level > whole) k++;
                const int next = k < n_phases ? k : 0;
                fetch(ahead, program[next], far[next], lane, worker, slot_of(program[next]));
            }
            float *const staged = vectors + turn * SEQUENCES * ROOM;
            turn ^= 1;
            stage(staged, of(logits, logits_stride, begin) + (current & 1) * (i64)logits_turn * 2, logits_stride, last,
                  vocabulary, [&](int) { return current; });
            __syncthreads();
            if (warp < SEQUENCES) {
                const int own = begin + min(warp, last);
                const i64 at = (i64)own * n_steps + step;
                bool finite;
                const int token = draw(staged + warp * ROOM, vocabulary, inverse, uniforms ? uniforms + at : nullptr, finite);
                all_finite &= finite;
                if (threadIdx.x % 32 == 0) now[warp] = token;
                if (block == 0 && threadIdx.x % 32 == 0) tokens[at] = token;
            }
            __syncthreads();
#pragma unroll
            for (int i = 0; i < POOLS; i++)
                if (i <= whole && i < n_pools) count[i] = count[i] + 1 == size[i] ? 0 : count[i] + 1;
        }
    }
    if (block == 0 && !all_finite) *failed = 1;
}
