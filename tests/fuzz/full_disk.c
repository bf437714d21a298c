/* Lets the n-th change to files below one folder find the disk full: preloaded, it stands before the C library, so that
   Python, Rust, C++ and sqlite writers all meet it. Writes into files that are open, new names (open that creates,
   rename, mkdir, link) and fsync count; a failing write puts down half of its bytes first, as a disk with some room
   does. Nothing happens until full_disk_arm() is called. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char below[4096];
static long fail_at, for_good, counted;
static char first[4200];

void full_disk_arm(const char *folder, long number, long stays) {
    strncpy(below, folder, sizeof below - 1);
    fail_at = number; for_good = stays; counted = 0; first[0] = 0;
}
void full_disk_disarm(void) { below[0] = 0; }
long full_disk_counted(void) { return counted; }
const char *full_disk_first(void) { return first; }

static int is_below(const char *path) {
    size_t length = strlen(below);
    return length && !strncmp(path, below, length) && (path[length] == '/' || !path[length]);
}
static int of_path(int folder, const char *path) {
    char full[8192], place[64], base[4096];
    if (!below[0] || !path) return 0;
    if (path[0] == '/') return is_below(path);
    if (folder == AT_FDCWD) { if (!getcwd(base, sizeof base)) return 0; }
    else {
        snprintf(place, sizeof place, "/proc/self/fd/%d", folder);
        ssize_t size = readlink(place, base, sizeof base - 1);
        if (size < 0) return 0;
        base[size] = 0;
    }
    snprintf(full, sizeof full, "%s/%s", base, path);
    return is_below(full);
}
static int of_handle(int handle, char *name, size_t room) {
    char place[64];
    if (!below[0]) return 0;
    snprintf(place, sizeof place, "/proc/self/fd/%d", handle);
    ssize_t size = readlink(place, name, room - 1);
    if (size < 0) return 0;
    name[size] = 0;
    return is_below(name);
}
static int fails(const char *what, const char *name) {
    long now = __sync_add_and_fetch(&counted, 1);
    int full = now == fail_at || (for_good && now > fail_at);
    if (now == fail_at) snprintf(first, sizeof first, "%s %s", what, name);
    return full;
}
#define REAL(name) ((typeof(&name))dlsym(RTLD_NEXT, #name))
#define FULL(result) do { errno = ENOSPC; return result; } while (0)

ssize_t write(int handle, const void *data, size_t size) {
    char name[4096];
    if (of_handle(handle, name, sizeof name) && fails("write", name)) {
        if (for_good && counted == fail_at && size > 1) return REAL(write)(handle, data, size / 2); /* the last room */
        FULL(-1);
    }
    return REAL(write)(handle, data, size);
}
ssize_t pwrite(int handle, const void *data, size_t size, off_t at) {
    char name[4096];
    if (of_handle(handle, name, sizeof name) && fails("pwrite", name)) { REAL(pwrite)(handle, data, size / 2, at); FULL(-1); }
    return REAL(pwrite)(handle, data, size, at);
}
ssize_t pwrite64(int handle, const void *data, size_t size, off64_t at) {
    char name[4096];
    if (of_handle(handle, name, sizeof name) && fails("pwrite", name)) { REAL(pwrite64)(handle, data, size / 2, at); FULL(-1); }
    return REAL(pwrite64)(handle, data, size, at);
}
ssize_t writev(int handle, const struct iovec *parts, int count) {
    char name[4096];
    if (of_handle(handle, name, sizeof name) && fails("writev", name)) FULL(-1);
    return REAL(writev)(handle, parts, count);
}
ssize_t sendfile(int to, int from, off_t *at, size_t size) {
    char name[4096];
    if (of_handle(to, name, sizeof name) && fails("sendfile", name)) FULL(-1);
    return REAL(sendfile)(to, from, at, size);
}
ssize_t sendfile64(int to, int from, off64_t *at, size_t size) {
    char name[4096];
    if (of_handle(to, name, sizeof name) && fails("sendfile", name)) FULL(-1);
    return REAL(sendfile64)(to, from, at, size);
}
int fsync(int handle) {
    char name[4096]; struct stat found;
    if (of_handle(handle, name, sizeof name) && !fstat(handle, &found) && S_ISREG(found.st_mode) && fails("fsync", name)) FULL(-1);
    return REAL(fsync)(handle);
}
int fdatasync(int handle) {
    char name[4096];
    if (of_handle(handle, name, sizeof name) && fails("fdatasync", name)) FULL(-1);
    return REAL(fdatasync)(handle);
}
#define CREATES(folder, path, flags) ((flags & O_CREAT) && of_path(folder, path) && \
    faccessat(folder, path, F_OK, 0) && fails("create", path))
#define OPENS(name) int name(const char *path, int flags, ...) { \
    va_list more; va_start(more, flags); mode_t mode = va_arg(more, int); va_end(more); \
    if (CREATES(AT_FDCWD, path, flags)) FULL(-1); \
    return REAL(name)(path, flags, mode); }
OPENS(open)
OPENS(open64)
#define OPENS_AT(name) int name(int folder, const char *path, int flags, ...) { \
    va_list more; va_start(more, flags); mode_t mode = va_arg(more, int); va_end(more); \
    if (CREATES(folder, path, flags)) FULL(-1); \
    return REAL(name)(folder, path, flags, mode); }
OPENS_AT(openat)
OPENS_AT(openat64)
#define STREAM(name) FILE *name(const char *path, const char *mode) { \
    if (mode[0] != 'r' && of_path(AT_FDCWD, path) && access(path, F_OK) && fails("create", path)) FULL(NULL); \
    return REAL(name)(path, mode); }
STREAM(fopen)
STREAM(fopen64)
int rename(const char *from, const char *to) {
    if (of_path(AT_FDCWD, to) && fails("rename", to)) FULL(-1);
    return REAL(rename)(from, to);
}
int renameat(int one, const char *from, int other, const char *to) {
    if (of_path(other, to) && fails("rename", to)) FULL(-1);
    return REAL(renameat)(one, from, other, to);
}
int mkdir(const char *path, mode_t mode) {
    if (of_path(AT_FDCWD, path) && access(path, F_OK) && fails("mkdir", path)) FULL(-1);
    return REAL(mkdir)(path, mode);
}
int mkdirat(int folder, const char *path, mode_t mode) {
    if (of_path(folder, path) && faccessat(folder, path, F_OK, 0) && fails("mkdir", path)) FULL(-1);
    return REAL(mkdirat)(folder, path, mode);
}
