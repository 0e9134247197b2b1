#include "ptx/program.hpp"

#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

namespace simt::ptx {
namespace {

std::string_view trimmed(std::string_view text) {
  while (!text.empty() && std::isspace(static_cast<unsigned char>(text.front()))) {
    text.remove_prefix(1);
  }
  while (!text.empty() && std::isspace(static_cast<unsigned char>(text.back()))) {
    text.remove_suffix(1);
  }
  return text;
}

bool is_word(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || std::strchr("_$%@.", c) != nullptr;
}

int64_t integer_in(std::string_view text) {
  return static_cast<int64_t>(std::strtoull(std::string(text).c_str(), nullptr, 0));
}

// The number after the first `word`.
int64_t number_after(std::string_view text, std::string_view word) {
  const size_t at = text.find(word);
  if (at == text.npos) fail("PTX: no number follows", word);
  return integer_in(text.substr(at + word.size(), 20));
}

std::string without_comments(std::string_view text) {
  std::string kept;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text.substr(i, 2) == "//") {
      while (i < text.size() && text[i] != '\n') ++i;
    }
    if (i < text.size()) kept += text[i];
  }
  return kept;
}

class Parser {
 public:
  explicit Parser(std::string_view text) {
    program_.registers.assign(static_cast<size_t>(Special::kCount), ~uint64_t{0});
    const size_t name = text.find("_Z"), parameters = text.find('('), body = text.find('{');
    if (body == text.npos) fail("PTX: a kernel without a body");
    program_.name = trimmed(text.substr(name, parameters - name));
    program_.parameter_bytes =
        static_cast<size_t>(number_after(text.substr(0, body), program_.name + "_param_0["));
    program_.most_threads = static_cast<int>(number_after(text.substr(0, body), ".maxntid"));
    add_specials();
    const std::string statements = without_comments(text.substr(body + 1));
    read(statements);
    for (const auto& [instruction, label] : branches_) {
      const auto target = labels_.find(label);
      if (target == labels_.end()) fail("PTX: a branch to nowhere", label);
      program_.instructions[instruction].target = target->second;
    }
  }

  Program take() { return std::move(program_); }

 private:
  void add_specials() {
    const std::pair<const char*, Special> names[] = {
        {"%tid.x", Special::kThread},
        {"%ctaid.x", Special::kCta},
        {"%nctaid.x", Special::kNumCtas},
        {"%cluster_ctarank", Special::kRankInCluster},
        {"%cluster_nctarank", Special::kClusterSize},
        {"%clusterid.x", Special::kCluster},
        {"%nclusterid.x", Special::kNumClusters},
        {"_", Special::kSink},
    };
    for (const auto& [name, special] : names) slots_[name] = static_cast<uint32_t>(special);
    slots_[program_.name + "_param_0"] = static_cast<uint32_t>(Special::kParameters);
    // The only shared memory there is, see common/instructions.cuh.
    slots_["_ZN7attnres4cuda20dynamic_shared_bytesE"] = static_cast<uint32_t>(Special::kShared);
  }

  // Statements end with ';'. A brace at the start of one opens or closes a scope of names; inside
  // of one it holds operands.
  void read(std::string_view text) {
    int depth = 1;
    while (depth > 0) {
      text = trimmed(text);
      if (text.empty()) fail("PTX: a kernel ends early", program_.name);
      if (text.front() == '{' || text.front() == '}') {
        if (text.front() == '{') {
          scopes_.push_back("@" + std::to_string(++num_scopes_));
          ++depth;
        } else if (--depth > 0) {
          scopes_.pop_back();
        }
        text.remove_prefix(1);
        continue;
      }
      size_t end = 0;
      while (end < text.size() && is_word(text[end])) ++end;
      if (text.substr(end, 1) == ":" && text.substr(end, 2) != "::") {
        labels_[scoped(text.substr(0, end))] = static_cast<uint32_t>(program_.instructions.size());
      } else {
        end = text.find(';');
        if (end == text.npos) fail("PTX: a statement without an end in", program_.name);
        statement(trimmed(text.substr(0, end)));
      }
      text.remove_prefix(end + 1);
    }
  }

  // Labels and names declared in a scope are its own.
  std::string scoped(std::string_view name) const {
    std::string full(name);
    if (name.front() != '$' && !scopes_.empty()) full += scopes_.back();
    return full;
  }

  void statement(std::string_view text) {
    if (text.substr(0, 4) == ".reg") return declare(text);
    if (text.substr(0, 7) == ".pragma") return;
    Instruction instruction;
    instruction.text = text;
    if (text.front() == '@') {
      const size_t space = text.find_first_of(" \t");
      instruction.guard_is_negated = text[1] == '!';
      const size_t name = instruction.guard_is_negated ? 2 : 1;
      instruction.guard = static_cast<int32_t>(slot(text.substr(name, space - name)));
      text = trimmed(text.substr(space));
    }
    const size_t end = text.find_first_of(" \t");
    const std::string_view name = text.substr(0, end);
    const std::string_view rest = end == text.npos ? "" : trimmed(text.substr(end));
    instruction.operation = operation_of(name);
    if (name.substr(0, 3) == "bra") {
      branches_.emplace_back(program_.instructions.size(), scoped(rest));
    } else {
      add_operands(rest, instruction);
    }
    program_.instructions.push_back(std::move(instruction));
  }

  // Only names in a scope have to be told from others; %r<100> and the like are made when used.
  void declare(std::string_view text) {
    if (scopes_.empty()) return;
    size_t at = text.find_last_of(" \t") + 1;
    for (std::string_view names = text.substr(at); !names.empty();) {
      const size_t comma = names.find(',');
      slots_[scoped(names.substr(0, comma))] = new_slot(~uint64_t{0});
      if (comma == names.npos) break;
      names.remove_prefix(comma + 1);
    }
  }

  void add_operands(std::string_view text, Instruction& instruction) {
    bool has_braces = false;
    for (size_t i = 0; i < text.size();) {
      const char c = text[i];
      if (c == '{' && !has_braces) {
        has_braces = true;
        instruction.first_in_braces = static_cast<uint32_t>(instruction.operands.size());
        instruction.count = 1;
        for (size_t j = i; text[j] != '}'; ++j) instruction.count += text[j] == ',';
      }
      if (std::isspace(static_cast<unsigned char>(c)) || std::strchr("{},[]|", c) != nullptr) {
        ++i;
        continue;
      }
      size_t end = i;
      while (end < text.size() && (is_word(text[end]) || (end == i && text[end] == '-'))) ++end;
      if (end == i) fail("PTX: an operand that is not understood:", instruction.text);
      Operand operand = {slot(text.substr(i, end - i)), 0};
      if (end < text.size() && text[end] == '+') {
        const size_t close = text.find(']', end);
        operand.offset = integer_in(text.substr(end + 1, close - end - 1));
        end = close;
      }
      instruction.operands.push_back(operand);
      i = end;
    }
  }

  uint32_t new_slot(uint64_t value) {
    program_.registers.push_back(value);
    return static_cast<uint32_t>(program_.registers.size() - 1);
  }

  uint32_t slot(std::string_view name) {
    std::string full(name);
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      if (const auto found = slots_.find(full + *scope); found != slots_.end()) {
        return found->second;
      }
    }
    const auto [place, is_new] = slots_.try_emplace(full, 0);
    if (is_new) {
      const bool is_number =
          std::isdigit(static_cast<unsigned char>(name.front())) || name.front() == '-';
      if (!is_number && name.front() != '%') fail("PTX: an unknown name", name);
      place->second = new_slot(is_number ? constant(full) : ~uint64_t{0});
    }
    return place->second;
  }

  // 0f and 0d: the bits of a float or double.
  static uint64_t constant(const std::string& text) {
    const std::string kind = text.substr(0, 2);
    if (kind == "0f" || kind == "0d") return std::strtoull(text.c_str() + 2, nullptr, 16);
    return static_cast<uint64_t>(integer_in(text));
  }

  Program program_;
  std::map<std::string, uint32_t> slots_;
  std::map<std::string, uint32_t> labels_;
  std::vector<std::pair<size_t, std::string>> branches_;
  std::vector<std::string> scopes_;
  int num_scopes_ = 0;
};

}  // namespace

void fail(std::string_view what, std::string_view about) {
  std::fprintf(stderr, "simt: %.*s %.*s\n", static_cast<int>(what.size()), what.data(),
               static_cast<int>(about.size()), about.data());
  std::abort();
}

Program parse(std::string_view text) { return Parser(text).take(); }

}  // namespace simt::ptx
