// Where the last tokens of a timeline were said before.
//
// Positions are kept in hash chains, as the compressors of the LZ77 family do: of the last n_gram tokens up to a position,
// the latest position with the same hash, and from each position the one before it. Adding a token and taking it back cost
// the same at any length of the timeline, and looking follows a bounded number of links. What that bound hides is found by
// going on: a match is held on to while the text follows it.
#pragma once

#include <cstdint>
#include <vector>

namespace pf {

struct Match {
    int64_t at = -1;    // position of the last token that matches; -1: there is none
    int32_t length = 0; // tokens that match, counted up to CopyIndex::max_length
};

class CopyIndex {
  public:
    static constexpr int32_t n_gram = 3;      // shortest match
    static constexpr int32_t max_length = 32; // what is longer is as good
    static constexpr int32_t max_links = 256; // positions looked at

    explicit CopyIndex(int64_t n_ctx); // sets aside all it will need: 8 to 12 bytes a token

    void clear();
    void grow(const int32_t * tokens, int64_t n);   // the timeline has grown to n tokens
    void shrink(const int32_t * tokens, int64_t n); // and goes back to n of them
    // The longest match of the timeline's end with what stands before it, the latest of equals.
    Match match(const int32_t * tokens);

  private:
    uint32_t slot(const int32_t * tokens, int64_t last) const;
    int32_t length(const int32_t * tokens, int64_t at) const;

    std::vector<int32_t> latest_;   // [power of two], by hash of an n-gram: its latest position + 1; 0: none
    std::vector<int32_t> previous_; // [n_ctx], by position: the one before in its chain + 1; 0: none
    int32_t shift_;                 // of a 32-bit hash
    int64_t n_ = 0;                 // tokens in it

    Match held_;         // the last match found,
    int64_t held_n_ = 0; // when the timeline had so many tokens
};

} // namespace pf
