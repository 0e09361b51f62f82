# The directories that layers are placed in, as a tree of nodes below one handle, and what is known of the names in them.
# One thread uses it, the reader; others use handles, as long as the block that their job belongs to is under way.
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint32_t

from estargz._memory cimport buffer, byte_map
from estargz._place cimport place_meta, place_rules

cdef enum:
    NAME_MOST = 255             # bytes of a component: NAME_MAX of every file system
    WALK_LINK = -1001           # answers beside nodes and codes of status.h
    WALK_MISSING = -1002
    LISTEN_DIRECTORIES = 256    # how many are gone through between two calls of attend

# A directory that entries are placed in.
ctypedef struct directory_node:
    int64_t parent          # the root's is the root
    size_t name_at          # in node_names; ends in NUL
    uint32_t name_size
    int handle              # -1: closed
    int64_t newer           # neighbours in the list of open ones, -1 at its ends
    int64_t older
    int64_t last_block      # whose jobs use the handle
    int64_t layer           # the last that put something in it or below
    int64_t cleared         # the last of which it is known that there is nothing else in it
    int64_t meta_at         # its row in metas, -1: none
    bint ours               # made here: its mode is 0700 until the end
    bint plain              # what is created in it gets the group and mode that were asked for
    bint gone

# What a directory gets when everything is in it.
ctypedef struct directory_meta:
    place_meta meta         # attributes are a copy that belongs to it
    int64_t number
    int64_t offset
    int64_t layer

# Functions answer EST_OK, a node, or a code of status.h, always negative, with errno set where that says why.
cdef class Folders:
    # Set by who extends it.
    cdef place_rules rules
    cdef int64_t max_entries
    cdef int64_t open_most               # directories kept open, 16 or more
    cdef uint8_t salt[8]                 # random, so that nobody can make names that collide
    cdef int64_t layer                   # the layer at hand, from 0
    cdef int64_t number                  # the entry at hand, over all layers
    cdef int64_t header_offset           # of its first header in the layer's tar
    cdef int64_t finished                # blocks whose jobs are done, with all before them

    cdef bint empty                      # the root was, in the beginning
    cdef int64_t placed                  # entries, and parents that none of them states
    cdef buffer nodes, metas, node_names
    cdef byte_map children               # salt, node, name -> node, or -1
    cdef byte_map names                  # the same key -> block with the job that makes it; of this layer
    cdef int64_t newest, oldest, open_count
    cdef int64_t xattrs_held
    cdef buffer last_parent, listing, climbed, left, spare, long_path
    cdef int64_t last_parent_node

    # For who extends it: waits until no job of a block, or of those before it, is under way; lets signal handlers run,
    # and says whether to go on.
    cdef void wait_through(self, int64_t sequence) noexcept nogil
    cdef void wait_all(self) noexcept nogil
    cdef bint attend(self) noexcept nogil

    # Node 0. ours: it was made for this.
    cdef int add_root(self, int root, bint ours) noexcept nogil
    cdef directory_node *node(self, int64_t number) noexcept nogil
    cdef const char *name_of(self, int64_t number) noexcept nogil
    cdef bint has_meta(self, int64_t number) noexcept nogil
    cdef directory_meta *meta_of(self, int64_t number) noexcept nogil
    # Fails when there are too many.
    cdef int count_entry(self) noexcept nogil

    # What is known of parent/name: the node of a directory, the block with the job that makes it; -1 if nothing is.
    cdef int64_t child_of(self, int64_t parent, const char *name, size_t size) noexcept nogil
    cdef int64_t block_of(self, int64_t parent, const char *name, size_t size) noexcept nogil
    # This layer has put something at a name, by a job of that block, or at once (-1); in a directory, or below it.
    cdef bint remember(self, int64_t parent, const char *name, int64_t sequence) noexcept nogil
    cdef void mark(self, int64_t number) noexcept nogil

    # The node of the directory that a cleaned path lies in; its last component begins at base. make: what is missing is
    # made, else WALK_MISSING.
    cdef int64_t parent_of(self, const buffer *path, uint32_t base, bint make) noexcept nogil
    # The node of a directory that is not known yet; a link is WALK_LINK. make: as above.
    cdef int64_t enter(self, int64_t parent, const char *name, size_t size, bint make) noexcept nogil
    # The node of a new directory. replace: or of one that is there, and anything else that is there goes.
    cdef int64_t make_directory(self, int64_t parent, const char *name, size_t size, bint replace) noexcept nogil
    # What a directory gets in the end; the attributes are copied. The last statement counts.
    cdef int set_meta(self, int64_t number, const place_meta *meta) noexcept nogil
    # Removes parent/name and all in it. No job for any of that may be under way.
    cdef int drop(self, int64_t parent, const char *name) noexcept nogil
    # As remove_tree; attends meanwhile.
    cdef int remove(self, int directory, const char *name) noexcept nogil
    # Empties a directory of what this layer has not put there, at any depth.
    cdef int clear_lower(self, int64_t number) noexcept nogil
    # A handle, good until the next call at least, and as long as jobs of the node's last_block are under way; -1 with
    # errno.
    cdef int handle_of(self, int64_t number) noexcept nogil
    cdef void close_handles(self) noexcept nogil
    # The path of a directory in long_path, for messages.
    cdef void set_long_path(self, int64_t number) noexcept nogil

    # Private.
    cdef int64_t *find(self, byte_map *map, int64_t parent, const char *name, size_t size) noexcept nogil
    cdef size_t key_of(self, uint8_t *key, int64_t parent, const char *name, size_t size) noexcept nogil
    cdef int64_t walk(self, const uint8_t *path, size_t size, bint make, bint *linked) noexcept nogil
    cdef int64_t add_node(self, int64_t parent, const char *name, size_t size, int handle, bint ours) noexcept nogil
    cdef int imply(self, int64_t number) noexcept nogil
    cdef int clear_one(self, int64_t number, buffer *waiting) noexcept nogil
    cdef int open_near(self, int64_t number) noexcept nogil
    cdef int open_far(self, int64_t above, size_t count, size_t end) noexcept nogil
    cdef void keep_open(self, int64_t number, int handle) noexcept nogil
    cdef void close_oldest(self) noexcept nogil
    cdef void unlist(self, int64_t number) noexcept nogil
    cdef void list_newest(self, int64_t number) noexcept nogil

# Lets us work in a directory of ours that will get its mode in the end.
cdef void unlock(int handle) noexcept nogil
