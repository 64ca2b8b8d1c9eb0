import EdgeStreamKit
import Foundation

/// The command line, with llama.cpp's flags.
struct Arguments {
    static let usage = """
        usage: edge-chat [-m MODEL] [-c N_CTX] [-n MAX_TOKENS] [-s SEED] [--temp T] [-t THREADS] [-sys TEXT]
                         [--samplers NAME;...] [--dry-multiplier X] [--xtc-probability P] [--mirostat 1|2]
                         [--adaptive-target P] [-tmpl NAME] [-ctk TYPE] [-ctv TYPE] [--session FILE] [--ignore-eos] [--no-loop-guard]
                         [MESSAGE...]

        Says each message and prints the answers; without messages, reads them from the terminal, line by line, for as long
        as you like. Without -m, the demo model of `make build`.
        """

    var model: String?
    var session: URL?
    var options = SessionOptions()
    var answer = AnswerOptions()
    var messages: [String] = []

    struct Invalid: Error {
        let sentence: String
    }

    init(_ words: [String]) throws(Invalid) {
        var rest = words[...]
        while let word = rest.popFirst() {
            guard word.hasPrefix("-"), word.count > 1 else {
                messages = [word] + rest
                return
            }
            if word == "--ignore-eos" {
                answer.ignoresEnd = true
                continue
            }
            if word == "--no-loop-guard" {
                answer.endsLoops = false
                continue
            }
            guard let value = rest.popFirst() else { throw Invalid(sentence: "\(word) needs a value") }
            switch word {
            case "-m": model = value
            case "-c": options.contextSize = try Self.number(word, value)
            case "-n": answer.maxTokens = try Self.number(word, value)
            case "-s": answer.sampling.seed = try Self.number(word, value)
            case "--temp": answer.sampling.temperature = try Self.number(word, value)
            case "--samplers": answer.sampling.samplers = value.split(separator: ";").map(String.init)
            case "--dry-multiplier": answer.sampling.dryMultiplier = try Self.number(word, value)
            case "--xtc-probability": answer.sampling.xtcProbability = try Self.number(word, value)
            case "--mirostat": answer.sampling.mirostat = try Self.number(word, value)
            case "--adaptive-target": answer.sampling.adaptiveTarget = try Self.number(word, value)
            case "-t": options.threads = try Self.number(word, value)
            case "-sys": options.systemPrompt = value
            case "-tmpl": options.chatTemplate = value
            case "-ctk": options.keyType = try Self.cacheType(word, value)
            case "-ctv": options.valueType = try Self.cacheType(word, value)
            case "--session": session = URL(fileURLWithPath: value)
            default: throw Invalid(sentence: "unknown flag \(word)")
            }
        }
    }

    private static func number<Number: LosslessStringConvertible>(
        _ flag: String, _ value: String
    ) throws(Invalid) -> Number {
        guard let number = Number(value) else { throw Invalid(sentence: "\(flag) \(value) is not a number") }
        return number
    }

    private static func cacheType(_ flag: String, _ value: String) throws(Invalid) -> CacheType {
        guard let type = CacheType(rawValue: value) else {
            throw Invalid(sentence: "\(flag) \(value) is none of \(CacheType.allCases.map(\.rawValue))")
        }
        return type
    }
}
