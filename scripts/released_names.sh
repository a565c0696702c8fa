# Sourced by scripts/eval_common.sh: takes what the published scripts of GlimpsePrune take, words and
# environment variables, and says it in our words. Sets CKPT, LIMIT, EXTRA, RELEASED_LABEL (ending of
# the answers file) and RELEASED_ADAPTER (for the scripts that all.sh starts, too).

RELEASED_LABEL=
export RELEASED_ADAPTER=${RELEASED_ADAPTER:-}
[ -z "${BASE_MODEL:-}" ] || export CKPT=$BASE_MODEL
[ -z "${NUM_SAMPLES:-}" ] || export LIMIT=$NUM_SAMPLES

# is_place WORD: whether it is a folder or a name on the hub, and neither number nor option.
is_place() {
    [[ ${1:-} != *=* && ${1:-} != -* && ! ${1:-} =~ ^[0-9.]+$ && (${1:-} == */* || -d ${1:-}) ]]
}

# place WORD: the folder as seen from anywhere, or the name on the hub.
place() {
    if [ -d "$1" ]; then realpath "$1"; else echo "$1"; fi
}

if is_place "${1:-}"; then
    RELEASED_WORDS=("new_modules_dir=$(place "$1")")
    shift
    if is_place "${1:-}"; then
        RELEASED_ADAPTER=$(place "$1")
        shift
    fi
    set -- "${RELEASED_WORDS[@]}" "$@"
fi

# released_switch NAME OPTION LABEL: a variable of the release that is on or off.
released_switch() {
    case ${!1:-0} in
    0 | false | False) unset "$1" ;;
    *) EXTRA+=" $2" RELEASED_LABEL+=$3 ;;
    esac
}

EXTRA=${EXTRA:-}
released_switch DO_GLIMPSE "--do-func-name glimpse" _glimpse
released_switch USE_REF --use-ref-masks _use_ref
released_switch SAVE_MASKS --save-masks ""
released_switch MEMORY_LOGGER --measure-memory _memory
released_switch BRIEF "" ""
if [ -n "${ATTN_IMPL:-}" ]; then
    EXTRA+=" --attn-implementation $ATTN_IMPL" RELEASED_LABEL+=_$ATTN_IMPL
fi
case ${NO_CACHE:-0} in
0 | false | False) ;;
*)
    echo "error: NO_CACHE=$NO_CACHE: without a cache a method would choose anew for every token; leave" \
        "it out" >&2
    exit 1
    ;;
esac
if [ "${ADAPTER_MERGE:-1}" = 0 ]; then
    echo "note: ADAPTER_MERGE=0: adapters are merged into the model here in any case" >&2
fi
