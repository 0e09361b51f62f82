/* Outcome codes of every kernel. Nothing raises inside a kernel: a function returns EST_OK (0), a positive count or
 * action, or one of these negative codes; estargz/errors.py turns a code into an exception, one row per code. */
#ifndef ESTARGZ_STATUS_H
#define ESTARGZ_STATUS_H

enum est_status {
    EST_OK = 0,
    EST_NO_MEMORY = -1,
    EST_CANCELLED = -2,       /* another part of the pipeline failed or the caller gave up */

    /* files of a source tree; est_failure.sys_errno says why */
    EST_OPEN = -10,
    EST_READ = -11,
    EST_STAT = -12,
    EST_LIST = -13,
    EST_READ_LINK = -14,
    EST_XATTR = -15,
    EST_GREW = -16,           /* more bytes than the size in the header */
    EST_SHRANK = -17,         /* fewer bytes than the size in the header */
    EST_REPLACED = -18,       /* another inode, type or time than when it was listed */
    EST_REDIRECT = -19,       /* overlayfs redirect: the directory's content lies elsewhere */
    EST_DEVICE_NUMBER = -20,  /* device number too large for a tar header */
    EST_NAME_TOO_LONG = -21,  /* header records of one entry exceed 1 MiB */
    EST_RESERVED_NAME = -22,  /* stargz.index.json or a landmark at the root of the layer */
    EST_TOC_SIZE = -23,       /* a table of contents, or the names in it, over 1 GiB */

    /* tar input */
    EST_TAR_CHECKSUM = -30,
    EST_TAR_NUMBER = -31,     /* a numeric field that is no number, is negative or out of range */
    EST_TAR_SPARSE = -32,     /* GNU or PAX sparse entry */
    EST_TAR_TYPE = -33,       /* typeflag that a layer cannot hold */
    EST_TAR_PAX = -34,        /* malformed PAX record */
    EST_TAR_META_SIZE = -35,  /* PAX or GNU long-name header over 1 MiB */
    EST_TAR_TRUNCATED = -36,
    EST_TAR_LONE_ZERO = -37,  /* one zero block followed by data */
    EST_TAR_DANGLING_META = -38, /* PAX or long-name header without an entry after it */
    EST_TAR_HALF_PADDING = -39, /* ends inside the padding of a file that is whole, where blocks are to follow */

    /* output */
    EST_WRITE = -50,          /* est_failure.sys_errno says why */
    EST_SINK = -51,           /* the caller's writer raised; its exception is kept aside */
    EST_COMPRESS = -52,       /* a library refused its input: a defect, never the input's fault */

    EST_NO_THREAD = -53,      /* est_failure.sys_errno says why */
    EST_FORKED = -54,         /* a build that a process began goes on in that process only */
    EST_POOL_FULL = -55,      /* a pool has no memory for another build of a thread that has one unfinished */

    /* compressed input */
    EST_GZIP_DATA = -60,
    EST_GZIP_CHECKSUM = -61,
    EST_GZIP_TRUNCATED = -62,
    EST_ZSTD_DATA = -63,
    EST_ZSTD_TRUNCATED = -64,
    EST_TRAILING_GARBAGE = -65,
    EST_TOO_LARGE = -66,      /* output beyond the caller's limit */

    /* placing entries in a directory; est_failure.sys_errno says why, est_failure.offset is the entry's header */
    EST_PLACE_CREATE = -70,
    EST_PLACE_WRITE = -71,
    EST_PLACE_META = -72,     /* owner, mode or time */
    EST_PLACE_XATTR = -73,
    EST_PLACE_REMOVE = -74,   /* what stands in an entry's place, or what a whiteout hides */
    EST_PLACE_PARENT = -75,   /* no directory where an entry needs one */
    EST_PLACE_ROOT = -76,     /* the name means the root, the type is none of a directory */
    EST_PLACE_LINK = -77,     /* the name is both names of the hard link */
    EST_LINK_TARGET = -78,    /* a hard link's target is not there; likewise */
    EST_LINK_UNSELECTED = -79, /* ... or is none of the paths that were asked for */
    EST_WHITEOUT_NAME = -80,  /* a whiteout of no name, or of a directory's own or its parent's */
    EST_OWNER_RANGE = -81,
    EST_DEVICE_RANGE = -82,
    EST_LIMIT_SIZE = -83,     /* more bytes than the caller allows */
    EST_LIMIT_ENTRIES = -84,
    EST_LIMIT_XATTRS = -85    /* attributes of directories that wait for the end take too much memory */
};

#endif
