/*
 * Prints what a container sees: one line of JSON for every path at or below the arguments. Linked statically, it is all that
 * an image needs to be run.
 */
#define _XOPEN_SOURCE 700
#define _DEFAULT_SOURCE
#include <fcntl.h>
#include <ftw.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>

static void print_bytes(const char *key, const unsigned char *bytes, size_t size)
{
    printf(", \"%s\": \"", key);
    for (size_t i = 0; i < size; i++)
        printf("%02x", bytes[i]);
    printf("\"");
}

static int print_crc(const char *path)
{
    static unsigned char buffer[1 << 16];
    uint32_t crc = 0xffffffff;
    ssize_t got;
    int fd = open(path, O_RDONLY);
    if (fd < 0)
        return -1;
    while ((got = read(fd, buffer, sizeof buffer)) > 0)
        for (ssize_t i = 0; i < got; i++) {
            crc ^= buffer[i];
            for (int bit = 0; bit < 8; bit++)
                crc = crc >> 1 ^ (crc & 1 ? 0xedb88320 : 0);
        }
    close(fd);
    printf(", \"crc32\": %u", crc ^ 0xffffffff);
    return (int)got;
}

static int show(const char *path, const struct stat *found, int type, struct FTW *where)
{
    unsigned char bytes[1 << 16];
    ssize_t size;
    (void)type, (void)where;
    printf("{\"mode\": %u, \"owner\": [%u, %u], \"mtime\": %lld", found->st_mode, found->st_uid, found->st_gid,
           (long long)found->st_mtime);
    print_bytes("path", (const unsigned char *)path, __builtin_strlen(path));
    if (!S_ISDIR(found->st_mode))
        printf(", \"links\": %u", (unsigned)found->st_nlink);
    if (S_ISCHR(found->st_mode) || S_ISBLK(found->st_mode))
        printf(", \"device\": [%u, %u]", major(found->st_rdev), minor(found->st_rdev));
    if (S_ISLNK(found->st_mode)) {
        if ((size = readlink(path, (char *)bytes, sizeof bytes)) < 0)
            return perror(path), 1;
        print_bytes("target", bytes, (size_t)size);
    }
    if (S_ISREG(found->st_mode)) {
        printf(", \"size\": %lld", (long long)found->st_size);
        if (print_crc(path) != 0)
            return perror(path), 1;
    }
    if ((size = lgetxattr(path, "security.capability", bytes, sizeof bytes)) > 0)
        print_bytes("capability", bytes, (size_t)size);
    printf("}\n");
    return 0;
}

int main(int count, char **arguments)
{
    for (int i = 1; i < count; i++)
        if (nftw(arguments[i], show, 16, FTW_PHYS) != 0)
            return perror(arguments[i]), 1;
    return fflush(stdout) != 0;
}
