// Model directories: which files count, what the index may say, links and odd files, reading, shrinking files.
#include "formats/checkpoint.h"
#include "tests/entries_help.h"

#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cmocka.h>

// Each test works in its own new directory, which is the current one meanwhile.
static char directory[64];
static int home_fd;

static int enter_directory(void **state)
{
    (void)state;
    strcpy(directory, "/tmp/test_checkpoint.XXXXXX");
    return !mkdtemp(directory) || chdir(directory) || mkdir("model", 0755);
}

static int leave_directory(void **state)
{
    (void)state;
    char command[128];
    snprintf(command, sizeof command, "rm -rf %s", directory);
    return fchdir(home_fd) || system(command);
}

static void write_file(const char *path, const void *bytes, size_t num_bytes)
{
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    assert_int_equal(fwrite(bytes, 1, num_bytes, file), num_bytes);
    assert_int_equal(fclose(file), 0);
}

static void write_text(const char *path, const char *text) { write_file(path, text, strlen(text)); }

// A safetensors file of u8 tensors, each 4 bytes long and filled with the last character of its name. names are
// separated by spaces.
static void write_tensors(const char *path, const char *names)
{
    char json[4096] = "{", data[4096];
    size_t used = 1, data_bytes = 0, length;
    for (const char *name = names; *name; name += length + (name[length] == ' ')) {
        length = strcspn(name, " ");
        used += (size_t)snprintf(json + used, sizeof json - used,
                                 "%s\"%.*s\":{\"dtype\":\"U8\",\"shape\":[2,2],\"data_offsets\":[%zu,%zu]}",
                                 data_bytes ? "," : "", (int)length, name, data_bytes, data_bytes + 4);
        memset(data + data_bytes, name[length - 1], 4);
        data_bytes += 4;
    }
    json[used++] = '}';
    uint8_t file[sizeof json + sizeof data + 8];
    for (int i = 0; i < 8; i++)
        file[i] = (uint8_t)((uint64_t)used >> 8 * i);
    memcpy(file + 8, json, used);
    memcpy(file + 8 + used, data, data_bytes);
    write_file(path, file, 8 + used + data_bytes);
}

// The index of model/, with this as the inside of weight_map.
static void write_index(const char *weight_map)
{
    char json[8192];
    snprintf(json, sizeof json, "{\"metadata\":{\"total_size\":1.5e3,\"x\":[{}]},\"weight_map\":{%s}}", weight_map);
    write_text("model/model.safetensors.index.json", json);
}

static void expect_refused(const char *what, int code, const char *word)
{
    struct checkpoint *checkpoint = NULL;
    struct error err = {0};
    int rc = checkpoint_open(&checkpoint, "model", &err);
    if (rc != code || checkpoint || err.code != code || !strstr(err.msg, word))
        fail_msg("%s: code %d, '%s' (expected %d, '%s')", what, rc, err.msg, code, word);
}

// Opens model/ and expects exactly these tensors ("a b c"), each with its contents.
static struct checkpoint *expect_tensors(const char *names)
{
    struct checkpoint *checkpoint;
    struct error err;
    if (checkpoint_open(&checkpoint, "model", &err))
        fail_msg("%s", err.msg);
    char found[4096] = "";
    for (size_t i = 0; i < checkpoint_tensor_count(checkpoint); i++) {
        const struct safetensors_tensor *tensor = checkpoint_tensor(checkpoint, i);
        char data[4];
        strcat(strcat(found, i ? " " : ""), tensor->name);
        assert_ptr_equal(checkpoint_find(checkpoint, tensor->name), tensor);
        assert_int_equal(checkpoint_read(checkpoint, tensor, 0, 4, data, NULL), 0);
        for (int b = 0; b < 4; b++)
            assert_int_equal(data[b], tensor->name[strlen(tensor->name) - 1]);
    }
    assert_string_equal(found, names);
    return checkpoint;
}

static void test_single_file(void **state)
{
    (void)state;
    write_tensors("model/model.safetensors", "w.b w.a");
    struct checkpoint *checkpoint = expect_tensors("w.a w.b");
    assert_null(checkpoint_find(checkpoint, "w"));
    assert_null(checkpoint_tensor(checkpoint, 2));
    assert_int_equal(checkpoint_file_count(checkpoint), 1);
    assert_string_equal(checkpoint_file_name(checkpoint, 0), "model.safetensors");
    assert_string_equal(checkpoint_file_path(checkpoint, 0), "model/model.safetensors");
    struct stat status;
    assert_int_equal(stat("model/model.safetensors", &status), 0);
    assert_int_equal(checkpoint_file_bytes(checkpoint, 0), status.st_size);
    checkpoint_close(checkpoint);
}

static void test_several_files(void **state)
{
    (void)state;
    write_tensors("model/m-2.safetensors", "b d");
    write_tensors("model/m-1.safetensors", "c a");
    write_index(
        "\"d\":\"m-2.safetensors\",\"a\":\"m-1.safetensors\",\"b\":\"m-2.safetensors\",\"c\":\"m-1.safetensors\"");
    struct checkpoint *checkpoint = expect_tensors("a b c d");
    assert_int_equal(checkpoint_file_count(checkpoint), 2);
    assert_string_equal(checkpoint_file_name(checkpoint, 0), "m-1.safetensors");
    assert_int_equal(checkpoint_find(checkpoint, "a")->file, 0);
    assert_int_equal(checkpoint_find(checkpoint, "b")->file, 1);
    checkpoint_close(checkpoint);
}

// What Hugging Face ignores is ignored: files that the index does not name, total_size (write_index gives nonsense),
// the index itself beside model.safetensors. A tensor that the index forgot is read.
static void test_what_is_ignored(void **state)
{
    (void)state;
    write_tensors("model/m-1.safetensors", "a forgotten");
    write_tensors("model/extra.safetensors", "a");
    write_text("model/broken.safetensors", "x");
    write_index("\"a\":\"m-1.safetensors\"");
    checkpoint_close(expect_tensors("a forgotten"));
    write_tensors("model/model.safetensors", "single");
    checkpoint_close(expect_tensors("single"));
    write_text("model/model.safetensors.index.json", "broken");
    checkpoint_close(expect_tensors("single"));
}

static void test_directory_without_a_model(void **state)
{
    (void)state;
    expect_refused("empty directory", ERR_MODEL, "holds neither model.safetensors nor model.safetensors.index.json");
    write_text("model/pytorch_model.bin", "pickle");
    expect_refused("another format", ERR_MODEL, "holds neither");
    write_tensors("model/model.safetensors", "");
    expect_refused("no tensors", ERR_MODEL, "holds no tensors");
    struct checkpoint *checkpoint = NULL;
    struct error err;
    assert_int_equal(checkpoint_open(&checkpoint, "absent", &err), ERR_MODEL);
    assert_non_null(strstr(err.msg, "no such model directory"));
    assert_int_equal(checkpoint_open(&checkpoint, "model/pytorch_model.bin", &err), ERR_MODEL);
    assert_non_null(strstr(err.msg, "is not a directory"));
}

#define NESTED_8 "[[[[[[[["

static void test_bad_indexes(void **state)
{
    (void)state;
    static const struct {
        const char *what, *json, *word;
    } cases[] = {
        {"empty", "", "'{' is missing"},
        {"array", "[]", "'{' is needed"},
        {"trailing bytes", "{\"weight_map\":{\"a\":\"m.safetensors\"}}x", "the end of the JSON"},
        {"no weight_map", "{\"metadata\":{}}", "has no weight_map"},
        {"empty weight_map", "{\"weight_map\":{}}", "has no weight_map"},
        {"weight_map is an array", "{\"weight_map\":[]}", "'{' is needed"},
        {"weight_map twice", "{\"weight_map\":{\"a\":\"m.safetensors\"},\"weight_map\":{}}", "occurs twice"},
        {"file is a number", "{\"weight_map\":{\"a\":1}}", "a string is needed"},
        {"tensor twice, same file", "{\"weight_map\":{\"a\":\"m.safetensors\",\"a\":\"m.safetensors\"}}", "'a' twice"},
        {"tensor twice, other file", "{\"weight_map\":{\"a\":\"m.safetensors\",\"a\":\"n.safetensors\"}}", "'a' twice"},
        {"empty tensor name", "{\"weight_map\":{\"\":\"m.safetensors\"}}", "tensor's name"},
        {"control character in a tensor name", "{\"weight_map\":{\"\\u001b\":\"m.safetensors\"}}", "tensor's name"},
        {"parent directory", "{\"weight_map\":{\"a\":\"../model/m.safetensors\"}}", "not a plain file name"},
        {"absolute path", "{\"weight_map\":{\"a\":\"/etc/passwd\"}}", "not a plain file name"},
        {"subdirectory", "{\"weight_map\":{\"a\":\"sub/m.safetensors\"}}", "not a plain file name"},
        {"two dots", "{\"weight_map\":{\"a\":\"..\"}}", "not a plain file name"},
        {"one dot", "{\"weight_map\":{\"a\":\".\"}}", "not a plain file name"},
        {"empty file name", "{\"weight_map\":{\"a\":\"\"}}", "not a plain file name"},
        {"NUL in a file name", "{\"weight_map\":{\"a\":\"m.safetensors\\u0000x\"}}", "not a plain file name"},
        {"newline in a file name", "{\"weight_map\":{\"a\":\"m\\n\"}}", "not a plain file name"},
        {"missing file", "{\"weight_map\":{\"a\":\"n.safetensors\"}}", "the index names it, but the file is missing"},
        {"case differs", "{\"weight_map\":{\"a\":\"M.safetensors\"}}", "the file is missing"},
        {"tensor in no file", "{\"weight_map\":{\"a\":\"m.safetensors\",\"b\":\"m.safetensors\"}}",
         "'b' should stand in m"},
        {"tensor in another file", "{\"weight_map\":{\"a\":\"o.safetensors\",\"c\":\"m.safetensors\"}}",
         "'a' should stand in o.safetensors, but is in m.safetensors"},
        {"tensor in two files", "{\"weight_map\":{\"a\":\"m.safetensors\",\"z\":\"twice.safetensors\"}}",
         "'a' stands in two files, m.safetensors and twice.safetensors"},
        {"index names a text file", "{\"weight_map\":{\"a\":\"model.safetensors.index.json\"}}", "header"},
        {"metadata unterminated", "{\"metadata\":[1,{\"a\":", "a JSON value is missing"},
        {"metadata with a bad number", "{\"metadata\":01}", "'}'"},
        {"metadata with a bare point", "{\"metadata\":1.}", "a JSON value"},
        {"metadata with a bad word", "{\"metadata\":nil}", "a JSON value"},
        {"metadata too deep",
         "{\"metadata\":" NESTED_8 NESTED_8 NESTED_8 NESTED_8 NESTED_8 NESTED_8 NESTED_8 NESTED_8 "[", "nested deeper"},
        {"mismatched brackets", "{\"metadata\":[{]}}", "a string is needed"},
    };
    write_tensors("model/m.safetensors", "a c");
    write_tensors("model/o.safetensors", "x");
    write_tensors("model/twice.safetensors", "a z");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        write_text("model/model.safetensors.index.json", cases[i].json);
        expect_refused(cases[i].what, ERR_MODEL, cases[i].word);
    }
    // What stands beside weight_map may be any JSON.
    write_text("model/model.safetensors.index.json", "{\"x\":[],\"weight_map\":{\"a\":\"m.safetensors\"},\"y\":{\"a\":["
                                                     "-1.5e+3,0,true,false,null,\"\\u00e9\",{}],\"b\":{}}} \n");
    checkpoint_close(expect_tensors("a c"));
}

// Cut at every byte, an index is refused.
static void test_truncated_index(void **state)
{
    (void)state;
    static const char json[] =
        "{\"metadata\":{\"total_size\":12,\"x\":[1,{\"y\":null}]},\"weight_map\":{\"a\":\"m\",\"b\":\"n\"}}";
    for (size_t cut = 0; cut <= sizeof json - 1; cut++) {
        uint8_t *copy = malloc(cut + 1);
        assert_non_null(copy);
        memcpy(copy, json, cut);
        uint8_t *exact = realloc(copy, cut ? cut : 1);
        struct checkpoint_index index;
        int rc = checkpoint_index_parse(&index, exact, cut, "index", NULL);
        assert_int_equal(rc, cut == sizeof json - 1 ? 0 : ERR_MODEL);
        if (!rc) {
            assert_int_equal(index.count, 2);
            assert_string_equal(index.entries[1].tensor, "b");
            assert_string_equal(index.entries[1].file, "n");
            checkpoint_index_clear(&index);
        }
        free(exact);
    }
}

// Links as Hugging Face's cache makes them: snapshots/x/model.safetensors -> ../../blobs/<hash>.
static void test_links_of_the_cache(void **state)
{
    (void)state;
    assert_int_equal(mkdir("blobs", 0755) | rmdir("model") | mkdir("snapshots", 0755) | mkdir("snapshots/x", 0755), 0);
    assert_int_equal(symlink("snapshots/x", "model"), 0);
    write_tensors("blobs/0123", "a");
    assert_int_equal(symlink("../../blobs/0123", "model/model.safetensors"), 0);
    checkpoint_close(expect_tensors("a"));
    assert_int_equal(unlink("blobs/0123"), 0);
    expect_refused("dangling link", ERR_MODEL, "the file is missing");
    // A dangling link is an incomplete download even where an index would do.
    write_tensors("model/m.safetensors", "a");
    write_index("\"a\":\"m.safetensors\"");
    expect_refused("dangling link beside an index", ERR_MODEL, "model/model.safetensors: the directory lists it");
    assert_int_equal(unlink("model/model.safetensors"), 0);
    assert_int_equal(rename("model/m.safetensors", "blobs/4567"), 0);
    assert_int_equal(symlink("../../blobs/4567", "model/m.safetensors"), 0);
    assert_int_equal(rename("model/model.safetensors.index.json", "blobs/89ab"), 0);
    assert_int_equal(symlink("../../blobs/89ab", "model/model.safetensors.index.json"), 0);
    checkpoint_close(expect_tensors("a"));
}

// P8: names that lead to anything but a regular file, for each of the three names that are opened. None may hang.
static void test_odd_files(void **state)
{
    (void)state;
    static const char *const names[] = {"model/model.safetensors", "model/model.safetensors.index.json",
                                        "model/m.safetensors"};
    alarm(20);
    for (int i = 0; i < 3; i++) {
        if (i == 2)
            write_index("\"a\":\"m.safetensors\"");
        assert_int_equal(mkfifo(names[i], 0644), 0);
        expect_refused("FIFO", ERR_MODEL, "is not a regular file");
        assert_int_equal(unlink(names[i]) | mkdir(names[i], 0755), 0);
        expect_refused("directory", ERR_MODEL, "is not a regular file");
        assert_int_equal(rmdir(names[i]) | symlink("/dev/zero", names[i]), 0);
        expect_refused("device", ERR_MODEL, "is not a regular file");
        assert_int_equal(unlink(names[i]), 0);
        struct sockaddr_un address = {.sun_family = AF_UNIX};
        strcpy(address.sun_path, names[i]);
        int fd = socket(AF_UNIX, SOCK_STREAM, 0);
        assert_int_equal(bind(fd, (struct sockaddr *)&address, sizeof address) | close(fd), 0);
        expect_refused("socket", ERR_MODEL, "is not a regular file");
        assert_int_equal(unlink(names[i]) | symlink(strrchr(names[i], '/') + 1, names[i]), 0);
        expect_refused("loop", ERR_MODEL, "loop");
        assert_int_equal(unlink(names[i]), 0);
    }
    alarm(0);
}

static void test_unreadable_file(void **state)
{
    (void)state;
    write_tensors("model/model.safetensors", "a");
    assert_int_equal(chmod("model/model.safetensors", 0), 0);
    if (geteuid() == 0) // root reads anything
        skip();
    expect_refused("no permission", ERR_IO, "Permission denied");
}

// P7: a 90 MB header of a million tensors is refused by its length, before it is read: the file here is sparse.
static void test_header_above_the_cap(void **state)
{
    (void)state;
    static const uint8_t prefix[8] = {0, 0, 0x60, 0x05}; // 90 MB
    write_file("model/model.safetensors", prefix, sizeof prefix);
    assert_int_equal(truncate("model/model.safetensors", 200 << 20), 0);
    struct rusage before, after;
    getrusage(RUSAGE_SELF, &before);
    expect_refused("large header", ERR_MODEL, "at most 33554432 are accepted");
    getrusage(RUSAGE_SELF, &after);
    assert_true(after.ru_maxrss - before.ru_maxrss < 1024);
    write_text("model/model.safetensors.index.json", "{");
    assert_int_equal(unlink("model/model.safetensors"), 0);
    assert_int_equal(truncate("model/model.safetensors.index.json", CHECKPOINT_INDEX_CAP_BYTES + 1), 0);
    expect_refused("large index", ERR_MODEL, "at most 67108864 are accepted");
}

static void test_short_files(void **state)
{
    (void)state;
    write_text("model/model.safetensors", "");
    expect_refused("empty file", ERR_MODEL, "too few");
    write_text("model/model.safetensors", "1234567");
    expect_refused("seven bytes", ERR_MODEL, "too few");
    write_tensors("model/model.safetensors", "a");
    struct stat status;
    assert_int_equal(stat("model/model.safetensors", &status), 0);
    assert_int_equal(truncate("model/model.safetensors", status.st_size - 1), 0);
    expect_refused("truncated data", ERR_MODEL, "truncated");
    assert_int_equal(truncate("model/model.safetensors", 20), 0);
    expect_refused("truncated header", ERR_MODEL, "truncated");
}

static void test_reading(void **state)
{
    (void)state;
    write_tensors("model/model.safetensors", "a b");
    struct checkpoint *checkpoint = expect_tensors("a b");
    const struct safetensors_tensor *a = checkpoint_find(checkpoint, "a"), *b = checkpoint_find(checkpoint, "b");
    char data[4];
    struct error err;
    assert_int_equal(checkpoint_read(checkpoint, a, 3, 1, data, &err), 0);
    assert_int_equal(data[0], 'a');
    assert_int_equal(checkpoint_read(checkpoint, a, 4, 0, data, &err), 0);
    assert_int_equal(checkpoint_read(checkpoint, a, 3, 2, data, &err), ERR_OTHER);
    assert_int_equal(checkpoint_read(checkpoint, a, UINT64_MAX, 2, data, &err), ERR_OTHER);
    // The file shrinks after it was opened.
    assert_int_equal(truncate("model/model.safetensors", (off_t)(b->offset + 2)), 0);
    assert_int_equal(checkpoint_read(checkpoint, a, 0, 4, data, &err), 0);
    assert_int_equal(checkpoint_read(checkpoint, b, 0, 2, data, &err), 0);
    assert_int_equal(checkpoint_read(checkpoint, b, 0, 4, data, &err), ERR_IO);
    assert_non_null(strstr(err.msg, "shrank"));
    checkpoint_close(checkpoint);
    checkpoint_close(NULL);
}

static void test_descriptors_are_closed(void **state)
{
    (void)state;
    int before = count_descriptors();
    write_tensors("model/m-1.safetensors", "a");
    write_tensors("model/m-2.safetensors", "b");
    write_index("\"a\":\"m-1.safetensors\",\"b\":\"m-2.safetensors\"");
    struct checkpoint *checkpoint = expect_tensors("a b");
    assert_int_equal(count_descriptors(), before + 2);
    checkpoint_close(checkpoint);
    write_text("model/m-2.safetensors", "broken");
    expect_refused("second file broken", ERR_MODEL, "m-2");
    assert_int_equal(count_descriptors(), before);
}

#define IN_DIRECTORY(test) cmocka_unit_test_setup_teardown(test, enter_directory, leave_directory)

int main(void)
{
    const struct CMUnitTest tests[] = {
        IN_DIRECTORY(test_single_file),
        IN_DIRECTORY(test_several_files),
        IN_DIRECTORY(test_what_is_ignored),
        IN_DIRECTORY(test_directory_without_a_model),
        IN_DIRECTORY(test_bad_indexes),
        cmocka_unit_test(test_truncated_index),
        IN_DIRECTORY(test_links_of_the_cache),
        IN_DIRECTORY(test_odd_files),
        IN_DIRECTORY(test_unreadable_file),
        IN_DIRECTORY(test_header_above_the_cap),
        IN_DIRECTORY(test_short_files),
        IN_DIRECTORY(test_reading),
        IN_DIRECTORY(test_descriptors_are_closed),
    };
    home_fd = open(".", O_RDONLY | O_DIRECTORY);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
