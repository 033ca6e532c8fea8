"""The JSON files of a tokenizer: only plain data under known keys is kept, so no key can name a file.

transformers passes every key of ``tokenizer_config.json`` and ``special_tokens_map.json`` to the tokenizer's class,
which opens the files named by ``vocab``, ``vocab_file`` or ``merges_file`` (transformers 5.23,
`PreTrainedTokenizerBase._from_pretrained` and `TokenizersBackend.convert_to_native_format`). So the known keys are
listed here, and other keys never reach it.
"""

from __future__ import annotations

from typing import Any, cast

from zeta_core.contract.model_json.config import check_tokenizer_class
from zeta_core.contract.model_json.faults import JsonLocation
from zeta_core.contract.model_json.values import check_plain, check_value, looks_like_a_path, names_a_file

_TOKEN_KEYS = ("content", "lstrip", "rstrip", "normalized", "single_word", "special", "__type", "id")
_TOKEN_LISTS = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")
# Numbers, booleans and names: the parameters of the tokenizers of transformers 5.23, and those of earlier versions that
# models still contain.
_PLAIN_TEXT = """
add_blank add_dummy_prefix add_prefix_space backend cell_trim_length chat_control_tokens clean_text
clean_up_tokenization_spaces cls_token_box do_basic_tokenize do_clean_text do_lower_case do_lowercase
do_lowercase_and_remove_accent do_phonemize do_subword_tokenize do_word_tokenize errors extra_ids fix_mistral_regex
is_uroman keep_accents lang langs language language_codes legacy legacy_behaviour lowercase lower_case
mask_token_sent max_column_id max_depth max_entity_length max_length max_lpw max_mention_length max_question_length
max_row_id max_width min_question_length model_input_names model_max_length never_split normalization normalize
num_reserved_special_tokens offset only_label_first_subword pad_to_multiple_of pad_token_box pad_token_id
pad_token_label pad_token_type_id pad_width padding padding_side phonemize phonemizer_backend phonemizer_lang
predict_timestamps remove_space replace_word_delimiter_char return_token_type_ids sanitize_control_tokens
sep_token_box separate_vocabs should_strip_spaces spaces_between_special_tokens special_tokens_pattern
split_by_punct split_special_tokens src_lang stride strip_accents strip_column_names strip_spaces
subword_tokenizer_type target_lang task tgt_lang token_type_ids_include_special_tokens token_type_ids_pattern
tokenize_chinese_chars trim_offsets truncation truncation_side truncation_strategy unk_id
update_answer_coordinates use_default_system_prompt verbose word_tokenizer_type wordpieces_prefix
"""
_PLAIN_KEYS = frozenset(_PLAIN_TEXT.split())
_SENTENCEPIECE_KEYS = ("enable_sampling", "nbest_size", "alpha", "num_threads", "add_bos", "add_eos", "reverse")
_TEMPLATES = ("chat_template", "response_template")
_TOKENIZER_PARTS = ("version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "post_processor")


def clean_tokenizer_config(config: dict[str, Any], location: JsonLocation) -> dict[str, Any]:
    """The known keys of a ``tokenizer_config.json``. Raises `InvalidModelFiles`."""
    clean: dict[str, Any] = {}
    for key, value in config.items():
        if key in _TEMPLATES:
            clean[key] = _clean_template(location, key, value)
        elif key == "tokenizer_class":
            check_tokenizer_class(location, key, value)
            clean[key] = value
        elif key == "added_tokens_decoder":
            clean[key] = _clean_added_tokens(location, key, value)
        elif key == "sp_model_kwargs":
            clean[key] = _clean_sentencepiece(location, key, value)
        elif key == "response_schema":
            clean[key] = value  # a JSON schema of the model's responses
        elif key in _TOKEN_LISTS or key.endswith("_token"):
            clean[key] = _clean_token(location, key, value)
        else:
            check_value(location, key, value)
            if key in _PLAIN_KEYS:
                clean[key] = value
    return clean


def clean_special_tokens(tokens: dict[str, Any], location: JsonLocation) -> dict[str, Any]:
    """The tokens of a ``special_tokens_map.json``. Raises `InvalidModelFiles`."""
    clean: dict[str, Any] = {}
    for key, value in tokens.items():
        if key in _TOKEN_LISTS or key.endswith("_token"):
            clean[key] = _clean_token(location, key, value)
        else:
            check_value(location, key, value)
    return clean


def clean_ids(tokens: dict[str, Any], location: JsonLocation) -> dict[str, Any]:
    """The ids of an ``added_tokens.json``. Raises `InvalidModelFiles`."""
    for token, number in tokens.items():
        if type(number) is not int:
            location.reject(token, number, "it must be the token's id, a whole number")
    return tokens


def check_tokenizer(tokenizer: dict[str, Any], location: JsonLocation) -> None:
    """Reject a ``tokenizer.json`` that does not contain its vocabulary: a string instead would be opened as a file."""
    model = tokenizer.get("model")
    if not isinstance(model, dict):
        location.reject(
            "model", model, "it must be an object with the vocabulary; save the tokenizer with save_pretrained"
        )
    for key, value in cast("dict[str, Any]", model).items():
        if key == "vocab" and not isinstance(value, (dict, list)):
            location.inside("model").reject(key, value, "it must contain the tokens themselves")
        elif key == "merges" and not (value is None or isinstance(value, list)):
            location.inside("model").reject(key, value, "it must contain the merges themselves")
        elif key not in ("vocab", "merges") and names_a_file(key):
            check_value(location.inside("model"), key, value)
    for key, value in tokenizer.items():
        if key not in (*_TOKENIZER_PARTS, "decoder", "model"):
            check_value(location, key, value)
    added = tokenizer.get("added_tokens")
    if added is not None and not (
        isinstance(added, list) and all(isinstance(item, dict) for item in cast("Any", added))
    ):
        location.reject("added_tokens", added, "it must be a list of tokens")


def _clean_token(location: JsonLocation, key: str, value: Any) -> Any:
    """A token, a list of tokens, or an object of named ones. Any text is allowed, because it never names a file."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, list) and key in _TOKEN_LISTS:
        return [_clean_token(location, key, token) for token in cast("list[Any]", value)]
    if isinstance(value, dict):
        token = cast("dict[str, Any]", value)
        if isinstance(token.get("content"), str) and key != "model_specific_special_tokens":
            if not all(isinstance(inner, (bool, str, int)) for inner in token.values()):
                location.reject(key, value, "it must contain only the token's text and its flags")
            return {name: inner for name, inner in token.items() if name in _TOKEN_KEYS}
        if key in _TOKEN_LISTS:
            return {name: _clean_token(location.inside(key), name, inner) for name, inner in token.items()}
    location.reject(key, value, "it must be a token's text, or an object with its 'content'")


def _clean_added_tokens(location: JsonLocation, key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        location.reject(key, value, "it must be an object that maps ids to tokens")
    clean: dict[str, Any] = {}
    for number, token in cast("dict[str, Any]", value).items():
        if not number.isdecimal() or not isinstance(token, dict):
            location.inside(key).reject(number, token, "it must map a token id to a token")
        clean[number] = _clean_token(location.inside(key), number, token)
    return clean


def _clean_template(location: JsonLocation, key: str, value: Any) -> Any:
    """A template's text, or several by name. Text that looks like a path and not like a template is rejected."""
    if isinstance(value, dict):
        inner = cast("dict[str, Any]", value)
        return {name: _clean_template(location.inside(key), name, text) for name, text in inner.items()}
    if isinstance(value, list):
        return [_clean_template(location, key, named) for named in cast("list[Any]", value)]
    if value is not None and not isinstance(value, str):
        location.reject(key, value, "it must be the text of a template")
    if value is not None and "{" not in value and "\n" not in value and looks_like_a_path(value):
        location.reject(key, value, "it must be the text of a template, not its path")
    return value


def _clean_sentencepiece(location: JsonLocation, key: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        location.reject(key, value, "it must be an object of SentencePiece options")
    options = cast("dict[str, Any]", value)
    for name, option in options.items():
        if name not in _SENTENCEPIECE_KEYS or not isinstance(option, (bool, int, float)):
            location.inside(key).reject(name, option, f"it must be one of {', '.join(_SENTENCEPIECE_KEYS)}; remove it")
    check_plain(location, key, options)
    return options
