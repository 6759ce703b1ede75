// The router's choice, and the products of the chosen experts alone. See cpu_experts.h.
#include "kernels/cpu_experts.h"

#include "formats/checked.h"
#include "kernels/cpu_device.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

int cpu_experts_alloc(struct device *d, struct error *err)
{
    const struct model_desc *desc = d->shape.desc;
    const struct rank_share *share = d->shape.share;
    struct expert_work *e = &d->experts;
    size_t slots = (size_t)expert_slots(desc, d->shape.max_rows);
    if (slots == 0)
        return 0;
    e->chosen = calloc(slots, sizeof *e->chosen);
    e->shared_factor = calloc((size_t)d->shape.max_rows, sizeof *e->shared_factor);
    e->place = calloc(slots, sizeof *e->place);
    e->first = calloc((size_t)share->num_experts_local + 1, sizeof *e->first);
    e->gate_up = calloc(slots * 2 * (size_t)share->expert_size_local + 1, sizeof *e->gate_up);
    e->out = calloc(slots * (size_t)desc->hidden_size, sizeof *e->out);
    if (!e->chosen || !e->shared_factor || !e->place || !e->first || !e->gate_up || !e->out)
        return error_set(err, ERR_MEMORY, "no memory for the experts of %lld rows", (long long)d->shape.max_rows);
    return activations_alloc(&e->act, (int64_t)slots, larger_of(desc->hidden_size, share->expert_size_local), err);
}

void cpu_experts_free(struct device *d)
{
    struct expert_work *e = &d->experts;
    free(e->chosen);
    free(e->shared_factor);
    free(e->place);
    free(e->first);
    free(e->gate_up);
    free(e->out);
    activations_free(&e->act);
}

// ---- the router ------------------------------------------------------------------------------------------------

static float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

static void softmax(float *x, int64_t count)
{
    float largest = x[0], sum = 0;
    for (int64_t i = 1; i < count; i++)
        largest = x[i] > largest ? x[i] : largest;
    for (int64_t i = 0; i < count; i++)
        sum += x[i] = expf(x[i] - largest);
    for (int64_t i = 0; i < count; i++)
        x[i] /= sum;
}

// The index of the largest value, the first of equals, which is then taken out of the running.
static int64_t take_largest(float *values, bool *taken, int64_t count)
{
    int64_t best = -1;
    for (int64_t i = 0; i < count; i++)
        if (!taken[i] && (best < 0 || values[i] > values[best]))
            best = i;
    taken[best] = true;
    return best;
}

// Takes the experts of all but the best groups out of the running.
static void choose_groups(const struct experts_desc *e, const float *choice, bool *taken)
{
    float rating[MODEL_MAX_EXPERTS];
    bool kept[MODEL_MAX_EXPERTS] = {false};
    int64_t size = e->num_experts / e->num_groups;
    for (int64_t g = 0; g < e->num_groups; g++) {
        float members[MODEL_MAX_EXPERTS];
        bool seen[MODEL_MAX_EXPERTS] = {false};
        memcpy(members, choice + g * size, (size_t)size * sizeof *members);
        rating[g] = 0;
        for (int64_t i = 0; i < e->group_members; i++)
            rating[g] += members[take_largest(members, seen, size)];
    }
    for (int64_t i = 0; i < e->groups_per_token; i++)
        take_largest(rating, kept, e->num_groups);
    for (int64_t i = 0; i < e->num_experts; i++)
        taken[i] = !kept[i / size];
}

static void weigh(const struct experts_desc *e, struct chosen_expert *chosen)
{
    float weights[MODEL_MAX_EXPERTS_PER_TOKEN], sum = 0;
    for (int64_t i = 0; i < e->experts_per_token; i++)
        weights[i] = chosen[i].weight;
    if (e->router == ROUTER_CHOSEN_SOFTMAX)
        softmax(weights, e->experts_per_token);
    for (int64_t i = 0; i < e->experts_per_token; i++)
        sum += weights[i];
    if (e->router == ROUTER_SIGMOID)
        sum += 1e-20f; // all of them may be zero
    for (int64_t i = 0; i < e->experts_per_token; i++)
        chosen[i].weight = (e->normalise ? weights[i] / sum : weights[i]) * (float)e->scale;
}

struct experts_job {
    struct device *d;
    const struct layer *layer;
    bool down; // of the products under way
    int64_t blocks_per_task;
};

static void route_row(void *arg, int64_t row, int thread)
{
    (void)thread;
    struct experts_job *job = arg;
    struct device *d = job->d;
    const struct experts_desc *e = &d->shape.desc->experts;
    const float *logits = d->buffers[BUFFER_ROUTER] + row * (e->num_experts + e->shared_gate);
    struct chosen_expert *chosen = d->experts.chosen + row * e->experts_per_token;
    float scores[MODEL_MAX_EXPERTS], choice[MODEL_MAX_EXPERTS];
    bool taken[MODEL_MAX_EXPERTS] = {false};
    for (int64_t i = 0; i < e->num_experts; i++)
        scores[i] = logits[i] + (job->layer->router_bias ? job->layer->router_bias[i] : 0.0f);
    if (e->router == ROUTER_SOFTMAX)
        softmax(scores, e->num_experts);
    for (int64_t i = 0; i < e->num_experts; i++) {
        if (e->router == ROUTER_SIGMOID)
            scores[i] = sigmoid(scores[i]);
        choice[i] = scores[i] + (job->layer->choice_bias ? job->layer->choice_bias[i] : 0.0f);
    }
    if (e->num_groups > 1)
        choose_groups(e, choice, taken);
    for (int64_t i = 0; i < e->experts_per_token; i++) {
        int64_t best = take_largest(choice, taken, e->num_experts);
        chosen[i] = (struct chosen_expert){(int32_t)best, scores[best]};
    }
    weigh(e, chosen);
    if (e->shared_gate)
        d->experts.shared_factor[row] = sigmoid(logits[e->num_experts]);
}

int cpu_route(struct device *d, int64_t layer, struct error *err)
{
    struct experts_job job = {.d = d, .layer = &d->weights->layers[layer]};
    (void)err;
    thread_pool_run(d->pool, route_row, &job, d->count);
    return 0;
}

// ---- products --------------------------------------------------------------------------------------------------

// Gives every slot of this rank's experts its place: expert by expert, rows ascending.
static void place_slots(struct device *d)
{
    const struct rank_share *share = d->shape.share;
    struct expert_work *e = &d->experts;
    int64_t slots = expert_slots(d->shape.desc, d->count), local = share->num_experts_local;
    memset(e->first, 0, (size_t)(local + 1) * sizeof *e->first);
    for (int64_t i = 0; i < slots; i++) {
        int64_t expert = e->chosen[i].expert - share->expert_begin;
        if (expert >= 0 && expert < local)
            e->first[expert + 1]++;
    }
    for (int64_t expert = 0; expert < local; expert++)
        e->first[expert + 1] += e->first[expert];
    int32_t total = e->first[local];
    for (int64_t i = slots - 1; i >= 0;
         i--) { // backwards: first[expert + 1] counts down from the expert's end to its begin
        int64_t expert = e->chosen[i].expert - share->expert_begin;
        e->place[i] = expert >= 0 && expert < local ? --e->first[expert + 1] : -1;
    }
    memmove(e->first, e->first + 1, (size_t)local * sizeof *e->first);
    e->first[local] = total;
}

static void gather_row(void *arg, int64_t row, int thread)
{
    (void)thread;
    struct experts_job *job = arg;
    struct device *d = job->d;
    int64_t per_token = d->shape.desc->experts.experts_per_token;
    for (int64_t i = row * per_token; i < (row + 1) * per_token; i++)
        if (d->experts.place[i] >= 0)
            activations_copy_row(&d->experts.act, d->experts.place[i], &d->act, row, d->input_kind);
}

static int64_t blocks_of(const struct experts_job *job, int64_t expert, bool down)
{
    const struct expert_work *e = &job->d->experts;
    const struct mlp *mlp = &job->layer->experts[expert];
    if (e->first[expert] == e->first[expert + 1])
        return 0;
    return (int64_t)div_up(down ? mlp->down.shape.rows : mlp->gate_up.shape.rows, WEIGHT_ROW_UNIT);
}

// Task `task` of the products of all experts: some rows of one expert's matrix, for all its slots.
static void expert_rows(void *arg, int64_t task, int thread)
{
    (void)thread;
    struct experts_job *job = arg;
    struct expert_work *e = &job->d->experts;
    int64_t expert = 0;
    for (int64_t tasks;; expert++, task -= tasks) {
        tasks = (blocks_of(job, expert, job->down) + job->blocks_per_task - 1) / job->blocks_per_task;
        if (task < tasks)
            break;
    }
    const struct matrix *w = job->down ? &job->layer->experts[expert].down : &job->layer->experts[expert].gate_up;
    int64_t rows = (int64_t)w->shape.rows, rows_per_task = job->blocks_per_task * WEIGHT_ROW_UNIT;
    int64_t begin = task * rows_per_task, end = begin + rows_per_task;
    struct activations act = activations_rows(&e->act, e->first[expert]);
    float *y = (job->down ? e->out : e->gate_up) + e->first[expert] * rows;
    job->d->k->matmul(y, rows, w, &act, e->first[expert + 1] - e->first[expert], begin, end < rows ? end : rows);
}

static void expert_products(struct experts_job *job, bool down)
{
    struct device *d = job->d;
    int64_t blocks = 0, tasks = 0, local = d->shape.share->num_experts_local;
    for (int64_t expert = 0; expert < local; expert++)
        blocks += blocks_of(job, expert, down);
    job->down = down;
    job->blocks_per_task = larger_of(1, blocks / (4 * thread_pool_size(d->pool)));
    for (int64_t expert = 0; expert < local; expert++)
        tasks += (blocks_of(job, expert, down) + job->blocks_per_task - 1) / job->blocks_per_task;
    thread_pool_run(d->pool, expert_rows, job, tasks);
}

static int64_t expert_at(const struct device *d, int64_t place)
{
    int64_t low = 0, high = d->shape.share->num_experts_local; // first[low] <= place < first[high]
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (d->experts.first[middle] <= place)
            low = middle;
        else
            high = middle;
    }
    return low;
}

static void activate_place(void *arg, int64_t place, int thread)
{
    (void)thread;
    struct experts_job *job = arg;
    struct device *d = job->d;
    const struct mlp *mlp = &job->layer->experts[expert_at(d, place)];
    int64_t size = (int64_t)mlp->down.shape.cols;
    float *gate = d->experts.gate_up + place * 2 * size;
    if (mlp->gate_up_bias)
        d->k->add(gate, mlp->gate_up_bias, 2 * size);
    d->k->activate(gate, gate, gate + size, size, d->shape.desc->activation);
    if (d->shape.desc->mlp_rotation > 0)
        d->k->hadamard(gate, size, d->shape.desc->mlp_rotation);
    d->k->prepare(&d->experts.act, &mlp->down, d->experts.gate_up, 2 * size, place, place + 1);
}

// The sum of a row does not depend on the rows beside it: its slots add up in the order of choice.
static void combine_row(void *arg, int64_t row, int thread)
{
    (void)thread;
    struct experts_job *job = arg;
    struct device *d = job->d;
    const struct rank_share *share = d->shape.share;
    const struct experts_desc *desc = &d->shape.desc->experts;
    int64_t hidden = d->shape.desc->hidden_size;
    float *partial = d->buffers[BUFFER_PARTIAL] + row * hidden;
    if (desc->shared_size == 0)
        memset(partial, 0, (size_t)hidden * sizeof *partial);
    else if (desc->shared_gate)
        for (int64_t i = 0; i < hidden; i++)
            partial[i] *= d->experts.shared_factor[row];
    for (int64_t i = row * desc->experts_per_token; i < (row + 1) * desc->experts_per_token; i++) {
        const struct chosen_expert *chosen = &d->experts.chosen[i];
        if (d->experts.place[i] < 0)
            continue;
        float *out = d->experts.out + d->experts.place[i] * hidden;
        const float *bias = job->layer->experts[chosen->expert - share->expert_begin].down_bias;
        if (bias && share->expert_mlp_begin == 0 && share->expert_size_local > 0) // empty ranks in front begin at 0 too
            d->k->add(out, bias, hidden);
        d->k->add_scaled(partial, out, hidden, chosen->weight);
    }
}

int cpu_experts(struct device *d, int64_t layer, struct error *err)
{
    struct experts_job job = {.d = d, .layer = &d->weights->layers[layer]};
    int64_t hidden = d->shape.desc->hidden_size;
    (void)err;
    if (d->shape.share->num_experts_local > 0) {
        place_slots(d);
        cpu_set_input(d, d->buffers[BUFFER_NORMED], hidden, d->count, &job.layer->experts[0].gate_up);
        thread_pool_run(d->pool, gather_row, &job, d->count);
        expert_products(&job, false);
        thread_pool_run(d->pool, activate_place, &job, d->experts.first[d->shape.share->num_experts_local]);
        expert_products(&job, true);
    } else {
        memset(d->experts.place, 0xff, (size_t)expert_slots(d->shape.desc, d->count) * sizeof *d->experts.place);
    }
    thread_pool_run(d->pool, combine_row, &job, d->count);
    return 0;
}
