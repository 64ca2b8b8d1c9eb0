// A preload that remembers what a loss of power would leave of a folder, and cuts it: for benchmarks/power_cut.py.
//
// ES_POWER_ROOT: the folder. ES_POWER_DISK: another one, made here, that holds what is durable:
//   inodes/N            content of inode N at its last fsync
//   names/PATH/NAME     a hard link to that, for what PATH (with ':' for '/') held at its own last fsync
// ES_POWER_CUT: the number of the operation (write, fsync, rename, unlink, truncate below the folder; counted over all
// processes) before which everything ends by SIGKILL; 0: never. Making and renaming folders is taken to be durable at
// once.
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { N_PATH = 4096 };

static char            root[N_PATH], disk[N_PATH];
static size_t          n_root;
static long *          counter; // shared by all processes
static long            cut;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

// The system's own function of this name.
#define NEXT(name)                                                                                                     \
    static __typeof__(&name) next;                                                                                     \
    if (!next) {                                                                                                       \
        next = (__typeof__(&name)) dlsym(RTLD_NEXT, #name);                                                            \
    }

static bool inside(const char * path) {
    return n_root && strncmp(path, root, n_root) == 0 && (path[n_root] == '/' || path[n_root] == '\0');
}

// The path of a descriptor, if it is below the folder.
static bool path_of(int fd, char * out) {
    char link[64];
    snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
    const ssize_t n = n_root ? readlink(link, out, N_PATH - 1) : -1;
    if (n < 0) {
        return false;
    }
    out[n] = '\0';
    return inside(out);
}

// An absolute path without links in its folder.
static bool full(int at, const char * path, char * out) {
    char folder[N_PATH], whole[2 * N_PATH];
    if (!n_root) {
        return false;
    }
    if (path[0] == '/') {
        snprintf(whole, sizeof(whole), "%s", path);
    } else if (at == AT_FDCWD) {
        if (!getcwd(folder, sizeof(folder))) {
            return false;
        }
        snprintf(whole, sizeof(whole), "%s/%s", folder, path);
    } else if (path_of(at, folder)) {
        snprintf(whole, sizeof(whole), "%s/%s", folder, path);
    } else {
        return false;
    }
    snprintf(out, N_PATH, "%.*s", N_PATH - 1, whole);
    return inside(out);
}

static void step(void) {
    if (__atomic_add_fetch(counter, 1, __ATOMIC_SEQ_CST) == cut) {
        kill(0, SIGKILL); // the process group: all that is being run
        pause();
    }
}

static void copy(const char * from, const char * to) {
    static char buffer[1 << 16];
    const int   in = open(from, O_RDONLY), out = open(to, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    ssize_t     n;
    NEXT(write)
    while (in >= 0 && out >= 0 && (n = read(in, buffer, sizeof(buffer))) > 0) {
        if (next(out, buffer, (size_t) n) != n) {
            abort();
        }
    }
    close(in);
    close(out);
}

static void inode_file(ino_t inode, char * out) {
    snprintf(out, N_PATH, "%s/inodes/%lu", disk, (unsigned long) inode);
}

static void names_folder(const char * path, char * out) {
    snprintf(out, N_PATH, "%s/names/", disk);
    size_t n = strlen(out);
    for (const char * p = path + n_root; *p && n < N_PATH - 1; ++p) {
        out[n++] = *p == '/' ? ':' : *p;
    }
    out[n] = '\0';
}

static void sync_names(const char * path) {
    char to[N_PATH], name[2 * N_PATH], inode[N_PATH];
    NEXT(unlink)
    names_folder(path, to);
    strncat(to, ":", N_PATH - strlen(to) - 1);
    mkdir(to, 0700);
    DIR * old = opendir(to);
    for (struct dirent * e; old && (e = readdir(old));) {
        snprintf(name, sizeof(name), "%s/%s", to, e->d_name);
        if (e->d_name[0] != '.' || strlen(e->d_name) > 2) {
            next(name);
        }
    }
    if (old) {
        closedir(old);
    }
    DIR * now = opendir(path);
    for (struct dirent * e; now && (e = readdir(now));) {
        struct stat st;
        snprintf(name, sizeof(name), "%s/%s", path, e->d_name);
        if (lstat(name, &st) != 0 || !S_ISREG(st.st_mode)) {
            continue;
        }
        inode_file(st.st_ino, inode);
        const int empty = open(inode, O_WRONLY | O_CREAT, 0600); // never synced: there, and empty
        close(empty);
        snprintf(name, sizeof(name), "%s/%s", to, e->d_name);
        if (link(inode, name) != 0) {
            abort();
        }
    }
    if (now) {
        closedir(now);
    }
}

static void sync_file(const char * path) {
    struct stat st;
    char        inode[N_PATH];
    if (lstat(path, &st) != 0) { // it has no name any more
        return;
    }
    if (S_ISDIR(st.st_mode)) {
        sync_names(path);
    } else if (S_ISREG(st.st_mode)) {
        inode_file(st.st_ino, inode);
        copy(path, inode);
    }
}

// The name ends: another file may get the inode.
static void gone(const char * path) {
    struct stat st;
    char        inode[N_PATH];
    if (lstat(path, &st) == 0 && S_ISREG(st.st_mode) && st.st_nlink == 1) {
        NEXT(unlink)
        inode_file(st.st_ino, inode);
        next(inode);
    }
}

static void all_is_durable(const char * path) {
    DIR * folder = opendir(path);
    char  name[2 * N_PATH];
    for (struct dirent * e; folder && (e = readdir(folder));) {
        struct stat st;
        snprintf(name, sizeof(name), "%s/%s", path, e->d_name);
        if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0 || lstat(name, &st) != 0) {
            continue;
        }
        if (S_ISDIR(st.st_mode)) {
            all_is_durable(name);
        } else {
            sync_file(name);
        }
    }
    if (folder) {
        closedir(folder);
    }
    sync_names(path);
}

__attribute__((constructor)) static void start(void) {
    const char *r = getenv("ES_POWER_ROOT"), *d = getenv("ES_POWER_DISK"), *c = getenv("ES_POWER_CUT");
    char        path[N_PATH + 32];
    if (!r || !d || strlen(r) >= N_PATH || strlen(d) >= N_PATH || !realpath(r, root)) {
        return;
    }
    strcpy(disk, d);
    cut              = c ? atol(c) : 0;
    const bool first = mkdir(disk, 0700) == 0;
    for (const char * part = "inodes"; part; part = strcmp(part, "inodes") == 0 ? "names" : NULL) {
        snprintf(path, sizeof(path), "%s/%s", disk, part);
        mkdir(path, 0700);
    }
    snprintf(path, sizeof(path), "%s/counter", disk);
    const int fd = open(path, O_RDWR | O_CREAT, 0600);
    if (ftruncate(fd, sizeof(long)) != 0) {
        abort();
    }
    counter = mmap(NULL, sizeof(long), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    n_root = strlen(root); // from here on
    if (first) {
        all_is_durable(root);
    }
}

#define COUNTED(path_is_known, action)                                                                                 \
    if (path_is_known) {                                                                                               \
        pthread_mutex_lock(&mutex);                                                                                    \
        step();                                                                                                        \
        action;                                                                                                        \
        pthread_mutex_unlock(&mutex);                                                                                  \
    }

ssize_t write(int fd, const void * data, size_t n) {
    NEXT(write)
    char path[N_PATH];
    COUNTED(path_of(fd, path), )
    return next(fd, data, n);
}

int ftruncate(int fd, off_t size) {
    NEXT(ftruncate)
    char path[N_PATH];
    COUNTED(path_of(fd, path), )
    return next(fd, size);
}

int ftruncate64(int fd, off64_t size) {
    return ftruncate(fd, size);
}

int fsync(int fd) {
    char path[N_PATH];
    COUNTED(path_of(fd, path), sync_file(path))
    return 0;
}

int fdatasync(int fd) {
    return fsync(fd);
}

int unlink(const char * path) {
    NEXT(unlink)
    char whole[N_PATH];
    COUNTED(full(AT_FDCWD, path, whole), gone(whole))
    return next(path);
}

int unlinkat(int at, const char * path, int flags) {
    NEXT(unlinkat)
    char whole[N_PATH];
    COUNTED(full(at, path, whole), gone(whole))
    return next(at, path, flags);
}

// A folder takes what is durable in it along. Both: they change places.
static void moved(const char * from, const char * to, bool both) {
    struct stat st;
    char        a[N_PATH], b[N_PATH], c[N_PATH + 8];
    if (lstat(from, &st) != 0 || !S_ISDIR(st.st_mode)) {
        if (!both) {
            gone(to);
        }
        return;
    }
    NEXT(rename)
    // folders inside it begin with the same text
    names_folder("", c);
    char list[N_PATH];
    snprintf(list, sizeof(list), "%s/names", disk);
    DIR * folder = opendir(list);
    names_folder(from, a);
    names_folder(to, b);
    const char *pa = strrchr(a, '/') + 1, *pb = strrchr(b, '/') + 1;
    for (struct dirent * e; folder && (e = readdir(folder));) {
        char         old[2 * N_PATH], new[3 * N_PATH];
        const size_t na = strlen(pa), nb = strlen(pb);
        const bool   is_a = strncmp(e->d_name, pa, na) == 0 && e->d_name[na] == ':';
        const bool   is_b = both && strncmp(e->d_name, pb, nb) == 0 && e->d_name[nb] == ':';
        if (is_a || is_b) {
            snprintf(old, sizeof(old), "%s/%s", list, e->d_name);
            snprintf(new, sizeof(new), "%s/+%s%s", list, is_a ? pb : pa, e->d_name + (is_a ? na : nb));
            next(old, new);
        }
    }
    if (folder) {
        rewinddir(folder);
        for (struct dirent * e; (e = readdir(folder));) {
            char old[2 * N_PATH], new[2 * N_PATH];
            if (e->d_name[0] == '+') {
                snprintf(old, sizeof(old), "%s/%s", list, e->d_name);
                snprintf(new, sizeof(new), "%s/%s", list, e->d_name + 1);
                next(old, new);
            }
        }
        closedir(folder);
    }
}

int renameat2(int from_at, const char * from, int to_at, const char * to, unsigned flags) {
    NEXT(renameat2)
    char a[N_PATH], b[N_PATH];
    COUNTED(full(from_at, from, a) & full(to_at, to, b), moved(a, b, flags & RENAME_EXCHANGE))
    return next(from_at, from, to_at, to, flags);
}

int rename(const char * from, const char * to) {
    NEXT(rename)
    char a[N_PATH], b[N_PATH];
    COUNTED(full(AT_FDCWD, from, a) & full(AT_FDCWD, to, b), moved(a, b, false))
    return next(from, to);
}

int renameat(int from_at, const char * from, int to_at, const char * to) {
    NEXT(renameat)
    char a[N_PATH], b[N_PATH];
    COUNTED(full(from_at, from, a) & full(to_at, to, b), moved(a, b, false))
    return next(from_at, from, to_at, to);
}
