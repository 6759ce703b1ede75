// The CUDA backend against the CPU's: tiny models, each with features of its own, through both; the logits of a prompt, of more of it,
// and of decode steps of several sequences must agree but for what their arithmetic rounds.
#include "tests/device/tiny_model.h"

extern "C" const struct backend *tpengine_cuda_backend(void);

namespace
{

enum {
    CONTEXT = 320,
    SEQUENCES = 3,
    PAGES = SEQUENCES * CONTEXT / KV_PAGE_TOKENS,
    MOST_ROWS = 80,
    DECODE_ROWS = 5,
    MOST_VOCAB = 64
};

struct model_case {
    const char *name;
    void (*change)(struct tiny_model *m);
    double tolerance =
        0.012; // of the largest logit: products' inputs are rounded to f16, those of prefill's attention to bf16
    enum kv_format kv = KV_BF16;
    // Where two experts are nearly equal the backends may choose differently, and values of an e4m3 cache may round to either side, which
    // later rows see: a third of the rows may be off.
    bool loose = false;
    int sm = 86;
};

// A device of a backend with a model; a step's logits.
struct run {
    const struct backend *b;
    struct device *d;
    struct tiny_model *m;
    struct device_shape shape;
};

void check(int rc, const char *name, const struct error *err)
{
    if (rc)
        fail_msg("%s: %s", name, err->msg);
}

void start(struct run *r, const struct backend *b, const struct tiny_model *m, const struct model_case *c,
           struct thread_pool *pool)
{
    struct error err;
    struct memory_plan plan;
    const uint8_t *base;
    struct device_options options = {scalar(), pool, 0, 1, -1};
    r->b = b;
    r->m = (struct tiny_model *)malloc(sizeof *m);
    memcpy(r->m, m, sizeof *m);
    r->m->fill = false;
    r->shape = {&r->m->desc, &r->m->share, MOST_ROWS, SEQUENCES,     DECODE_ROWS, CONTEXT,
                PAGES,       c->kv,        false,     TRANSPORT_SHM, false};
    check(b->open(&r->d, &options, &err), c->name, &err);
    check(b->plan(r->d, &r->shape, &plan, &err), c->name, &err);
    check(tiny_load(b, r->d, r->m, &base, &err), c->name, &err);
    tiny_bind(r->m, base);
    check(b->prepare(r->d, &r->shape, &r->m->weights, &err), c->name, &err);
}

void step(struct run *r, const char *name, const struct token_row *rows, int64_t count, enum phase phase,
          const struct kv_pages *pages, float *logits)
{
    struct error err;
    const struct join *join = &r->m->layers[r->m->desc.num_layers - 1].mlp_join;
    check(r->b->begin(r->d, rows, count, phase, pages, &err), name, &err);
    check(tiny_layers(r->b, r->d, r->m, &err), name, &err);
    check(r->b->logits(r->d, join, NULL, count, logits, r->m->share.vocab_local, &err), name, &err);
}

void compare(const struct model_case *c, const char *what, const float *got, const float *want, int64_t count,
             int64_t vocab)
{
    double largest = 0;
    for (int64_t i = 0; i < count * vocab; i++)
        largest = fmax(largest, fabs((double)want[i]));
    assert_true(largest > 1e-3 && isfinite(largest));
    int64_t off = 0, allowed = c->loose ? count / 3 : 0;
    for (int64_t row = 0; row < count; row++)
        for (int64_t i = row * vocab; i < (row + 1) * vocab; i++)
            if (!(fabs((double)got[i] - (double)want[i]) <= c->tolerance * largest)) {
                if (++off > allowed)
                    fail_msg("%s, %s: row %lld, logit %lld is %.9g, not %.9g (of %.3g)", c->name, what, (long long)row,
                             (long long)(i % vocab), (double)got[i], (double)want[i], largest);
                break;
            }
}

void check_model(const struct model_case *c, struct thread_pool *pool)
{
    struct tiny_model *m = tiny_make();
    struct run runs[2] = {};
    float *logits[2];
    int32_t table[PAGES];
    struct kv_pages pages = {table, CONTEXT / KV_PAGE_TOKENS, 1};
    for (int i = 0; i < PAGES; i++)
        table[i] = (i * 7 + 2) % PAGES;
    random_state = 77;
    c->change(m);
    emulator_set_sm(c->sm);
    m->fill = true;
    tiny_bind(m, m->payload);
    start(&runs[0], &backend_cpu, m, c, pool);
    start(&runs[1], tpengine_cuda_backend(), m, c, pool);

    // Two prompts, one in two parts; then all of their sequences and a new one together.
    struct token_row rows[MOST_ROWS];
    static const struct {
        int32_t sequence;
        int64_t position, count;
    } parts[] = {{1, 0, 70}, {0, 0, 3}, {1, 70, 5}};
    int64_t vocab = m->share.vocab_local, next[SEQUENCES] = {3, 75, 0};
    for (int r = 0; r < 2; r++)
        logits[r] = floats(MOST_ROWS * vocab);
    for (size_t p = 0; p < sizeof parts / sizeof *parts; p++) {
        for (int64_t i = 0; i < parts[p].count; i++)
            rows[i] = {(uint32_t)((p * 17 + (size_t)i * 5) % 64), parts[p].sequence, parts[p].position + i};
        for (int r = 0; r < 2; r++)
            step(&runs[r], c->name, rows, parts[p].count, PHASE_PREFILL, &pages, logits[r]);
        compare(c, "prefill", logits[1], logits[0], parts[p].count, vocab);
    }
    for (int turn = 0; turn < 2; turn++) {
        for (int32_t s = 0; s < SEQUENCES; s++)
            rows[s] = {(uint32_t)(11 * s + turn), s, next[s]++};
        for (int r = 0; r < 2; r++)
            step(&runs[r], c->name, rows, SEQUENCES, PHASE_DECODE, &pages, logits[r]);
        compare(c, "decode", logits[1], logits[0], SEQUENCES, vocab);
    }
    // Several rows of one sequence among those of others; and each of them alone: the same bits.
    for (int64_t i = 0; i < DECODE_ROWS; i++)
        rows[i] = {(uint32_t)(9 * i + 4),
                   i == 0  ? 2
                   : i < 4 ? 1
                           : 0,
                   i > 0 && i < 4 ? next[1]++ : next[i == 0 ? 2 : 0]};
    for (int r = 0; r < 2; r++)
        step(&runs[r], c->name, rows, DECODE_ROWS, PHASE_DECODE, &pages, logits[r]);
    compare(c, "several rows of a sequence", logits[1], logits[0], DECODE_ROWS, vocab);
    for (int64_t i = 0; i < DECODE_ROWS; i++) {
        step(&runs[1], c->name, rows + i, 1, PHASE_DECODE, &pages, logits[0]);
        assert_memory_equal(logits[0], logits[1] + i * vocab, (size_t)vocab * sizeof(float));
    }
    for (int r = 0; r < 2; r++) {
        runs[r].b->close(runs[r].d);
        free(runs[r].m);
        free(logits[r]);
    }
    free(m);
}

// ---- models --------------------------------------------------------------------------------------------------------------

void plain(struct tiny_model *m) { (void)m; }

void quantized(struct tiny_model *m)
{
    m->qkv = {WEIGHT_INT4, 32};
    m->o = {WEIGHT_INT8, 0};
    m->gate_up = {WEIGHT_INT4, 128};
    m->down = {WEIGHT_BF16, 0};
}

void grouped_kinds(struct tiny_model *m)
{
    m->qkv = {WEIGHT_INT4Z, 64};
    m->o = {WEIGHT_FP8G, 128};
    m->gate_up = {WEIGHT_MXFP4, 32};
    m->down = m->head = {WEIGHT_NVFP4, 16};
}

// Gemma 2: norms around the blocks, caps, gelu, every second layer with a window, large heads.
void capped(struct tiny_model *m)
{
    m->desc.head_dim = m->desc.rotary_dim = 256;
    m->desc.post_norms = true;
    m->desc.embedding_scale = 11.3;
    m->desc.attention_scale = 0.0625;
    m->desc.attention_softcap = 5;
    m->desc.logit_softcap = 3;
    m->desc.activation = ACTIVATION_GELU_TANH;
    m->desc.sliding_window = 40;
    m->desc.layer_flags[0] = LAYER_WINDOW;
}

// Gemma 3: two tables of frequencies, heads normed.
void two_ropes(struct tiny_model *m)
{
    m->desc.qk_norm = QK_NORM_HEAD;
    m->desc.rope_attention_factor = 1.25;
    m->desc.sliding_window = 9;
    m->desc.layer_flags[0] = LAYER_WINDOW | LAYER_LOCAL_ROPE;
}

// OLMo 2: norms behind the blocks only, q and k normed over all heads; biases everywhere.
void full_norms(struct tiny_model *m)
{
    m->desc.pre_norms = false;
    m->desc.post_norms = true;
    m->desc.qk_norm = QK_NORM_FULL;
    m->desc.qkv_bias = m->desc.o_bias = m->desc.mlp_bias = true;
}

// Phi-3 with its long table, partly rotated heads of 96; Granite's multipliers; a layer that does not rotate; interleaved pairs.
void partial_ropes(struct tiny_model *m)
{
    m->desc.head_dim = 96;
    m->desc.rotary_dim = 32;
    m->desc.rotary_interleaved = true;
    m->desc.rope_original_context = 100;
    m->desc.residual_scale = 0.22;
    m->desc.logit_scale = 0.125;
    m->desc.layer_flags[1] = LAYER_NO_ROPE;
}

// gpt-oss without its experts, and columns that were reordered.
void sinks(struct tiny_model *m)
{
    m->desc.sinks = m->desc.mlp_bias = true;
    m->desc.activation = ACTIVATION_GPT_OSS;
    m->desc.sliding_window = 32;
    m->desc.layer_flags[0] = LAYER_WINDOW;
    m->orders = true;
}

void with_experts(struct tiny_model *m, int64_t count, int64_t per_token, int64_t size)
{
    struct experts_desc *e = &m->desc.experts;
    e->num_experts = m->share.num_experts_local = count;
    e->experts_per_token = per_token;
    e->expert_size = m->share.expert_size_local = size;
    e->scale = 1;
    e->num_groups = e->groups_per_token = e->group_members = 1;
    m->desc.layer_flags[0] = m->desc.layer_flags[1] = LAYER_EXPERTS;
}

void mixtral(struct tiny_model *m)
{
    with_experts(m, 8, 2, 192);
    m->desc.experts.normalise = true;
}

// The first layer dense; groups of experts, a bias on the choice, a shared expert.
void deepseek_router(struct tiny_model *m)
{
    with_experts(m, 8, 3, 64);
    m->desc.layer_flags[0] = 0;
    m->desc.experts.router = ROUTER_SIGMOID;
    m->desc.experts.normalise = m->desc.experts.choice_bias = true;
    m->desc.experts.scale = 2.5;
    m->desc.experts.num_groups = 4;
    m->desc.experts.groups_per_token = m->desc.experts.group_members = 2;
    m->desc.experts.shared_size = m->share.shared_size_local = 64;
}

void gpt_oss(struct tiny_model *m)
{
    sinks(m);
    with_experts(m, 8, 4, 96);
    m->desc.experts.router = ROUTER_CHOSEN_SOFTMAX;
    m->desc.experts.router_bias = m->desc.experts.bias = true;
    m->gate_up = {WEIGHT_BF16, 0};
}

// A gated shared expert, columns that were reordered; and a rank that holds three of eight experts.
void some_experts(struct tiny_model *m)
{
    with_experts(m, 8, 3, 64);
    m->desc.experts.shared_size = m->share.shared_size_local = 128;
    m->desc.experts.shared_gate = true;
    m->share.expert_begin = 2;
    m->share.num_experts_local = 3;
    m->orders = true;
}

void with_latent(struct tiny_model *m, int64_t heads, int64_t q_rank, int64_t kv_rank, int64_t rope_dim)
{
    m->desc.num_heads = m->desc.num_kv_heads = m->share.num_heads_local = m->share.num_kv_heads_local = heads;
    m->desc.latent = {kv_rank, q_rank, 48, rope_dim, 40, 0.25}; // an epsilon that is felt
    m->desc.head_dim = 48 + rope_dim;
    m->desc.rotary_dim = rope_dim;
    m->desc.rotary_interleaved = true;
    m->desc.attention_scale = 0.2;
}

void deepseek_v2(struct tiny_model *m)
{
    with_latent(m, 3, 0, 64, 16);
    m->o = {WEIGHT_BF16, 0}; // kv_a's kind as well: the norm's rows are prepared twice
}

void small_latent(struct tiny_model *m)
{
    with_latent(m, 2, 0, 64, 16);
    m->desc.attention_scale = 0.05;
}

void deepseek_v3(struct tiny_model *m)
{
    with_latent(m, 5, 96, 200, 12);
    deepseek_router(m);
}

const struct model_case cases[] = {
    {"plain", plain},
    {"e4m3 cache", plain, 0.05, KV_E4M3},
    {"quantized", quantized, 0.05},
    {"grouped kinds", grouped_kinds, 0.05},
    // Inputs of mxfp4 and nvfp4 keep four bits of mantissa.
    {"grouped kinds on sm_120", grouped_kinds, 0.13, KV_BF16, false, 120},
    {"capped", capped},
    {"two ropes", two_ropes},
    {"full norms", full_norms},
    {"partial ropes", partial_ropes},
    {"sinks", sinks},
    {"mixtral", mixtral, 0.02, KV_BF16, true},
    {"deepseek's router", deepseek_router, 0.02, KV_BF16, true},
    {"gpt-oss", gpt_oss, 0.02, KV_BF16, true},
    {"deepseek v2", deepseek_v2, 0.02},
    {"latent, e4m3 cache", small_latent, 0.06, KV_E4M3, true},
    {"deepseek v3", deepseek_v3, 0.02, KV_BF16, true},
    {"some experts", some_experts, 0.02, KV_BF16, true},
};

void models_agree(void **state)
{
    struct thread_pool *pool;
    struct error err;
    (void)state;
    assert_int_equal(thread_pool_create(&pool, 2, &err), 0);
    for (size_t i = quick() ? 2 : 0; i < sizeof cases / sizeof *cases; i += quick() ? 6 : 1)
        check_model(&cases[i], pool);
    thread_pool_free(pool);
}

} // namespace

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(models_agree)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
