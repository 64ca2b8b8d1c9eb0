import CEdgeStream
import Foundation

/// Type of the keys or values in the cache, by llama.cpp's names.
public enum CacheType: String, Sendable, CaseIterable, Codable {
    case f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0, iq4_nl
}

public struct LoadOptions: Sendable, Hashable {
    /// Layers on the GPU; nil: as many as there are.
    public var gpuLayers: Int?
    /// Map the file instead of reading it: clean pages, which the system may drop and read again.
    public var mapsFile = true

    public init(gpuLayers: Int? = nil) {
        self.gpuLayers = gpuLayers
    }

    /// Calls body with the C parameters.
    func c() throws(EdgeStreamError) -> es_app_model_params {
        var p = es_app_model_default_params()
        p.n_gpu_layers = try gpuLayers.map { n throws(EdgeStreamError) in try fit(n, "gpuLayers") } ?? -1
        p.use_mmap = mapsFile
        return p
    }
}

public struct SessionOptions: Sendable, Hashable {
    /// Cache capacity in tokens: the model's memory. nil: what the model recommends.
    public var contextSize: Int?
    /// Least number of sinks. A system prompt is pinned as a whole.
    public var sinks = 4
    /// Most tokens per decode.
    public var batchSize = 512
    /// nil: as many as there are cores.
    public var threads: Int?
    public var keyType = CacheType.f16
    /// Quantised values need flash attention.
    public var valueType = CacheType.f16
    /// nil: where it is possible.
    public var flashAttention: Bool?
    /// False: a plain stream, without chat template.
    public var isChat = true
    /// nil: the model's own; else Jinja, or the name of one of llama.cpp's (chatml, llama3, gemma, ...).
    public var chatTemplate: String?
    public var systemPrompt: String?
    /// What the model may call, as in OpenAI's requests: a JSON list.
    public var tools: String?
    /// Whether the model shall think before it answers. nil: as its template has it.
    public var thinks: Bool?

    public init(contextSize: Int? = nil, systemPrompt: String? = nil, isChat: Bool = true) {
        self.contextSize = contextSize
        self.systemPrompt = systemPrompt
        self.isChat = isChat
    }

    /// Calls body with the C parameters, whose strings live as long as the call.
    func withC<Result>(_ body: (es_app_session_params) -> Result) throws(EdgeStreamError) -> Result {
        var p = es_app_session_default_params()
        p.n_ctx = try contextSize.map { n throws(EdgeStreamError) in try fit(n, "contextSize") } ?? 0
        p.n_keep = try fit(sinks, "sinks")
        p.n_batch = try fit(batchSize, "batchSize")
        p.n_threads = try threads.map { n throws(EdgeStreamError) in try fit(n, "threads") } ?? 0
        p.flash_attn = flashAttention.map { $0 ? 1 : 0 } ?? -1
        p.chat = isChat
        try refuseZeroBytes(chatTemplate)
        try refuseZeroBytes(systemPrompt)
        try refuseZeroBytes(tools)
        p.thinking = thinks.map { $0 ? 1 : 0 } ?? -1
        return keyType.rawValue.withCString { key in
            valueType.rawValue.withCString { value in
                withOptionalCString(chatTemplate) { template in
                    withOptionalCString(systemPrompt) { system in
                        withOptionalCString(tools) { tools in
                            p.cache_type_k = key
                            p.cache_type_v = value
                            p.chat_template = template
                            p.system = system
                            p.tools = tools
                            return body(p)
                        }
                    }
                }
            }
        }
    }
}

/// How tokens are chosen; the defaults are llama.cpp's.
public struct Sampling: Sendable, Hashable {
    /// nil draws one.
    public var seed: UInt32?
    /// 0: always the most likely token.
    public var temperature: Float = 0.8
    /// 0: off.
    public var topK = 40
    /// 1: off.
    public var topP: Float = 0.95
    /// 0: off.
    public var minP: Float = 0.05
    /// Locally typical sampling. 1: off.
    public var typicalP: Float = 1
    /// Standard deviations of the logits below the best that are kept. Negative: off.
    public var topNSigma: Float = -1
    /// Tokens that topP, minP, typicalP and XTC leave at least.
    public var minKeep = 0
    /// How often XTC drops the tokens above its threshold but for the least likely of them. 0: off.
    public var xtcProbability: Float = 0
    /// Above 0.5: off.
    public var xtcThreshold: Float = 0.1
    /// The temperature follows the entropy, by as much as this. 0: off.
    public var dynamicTemperatureRange: Float = 0
    public var dynamicTemperatureExponent: Float = 1
    /// 1: off.
    public var repeatPenalty: Float = 1
    /// How many tokens the penalties look back on; nil: as many as the cache holds.
    public var repeatLastN: Int? = 64
    public var frequencyPenalty: Float = 0
    public var presencePenalty: Float = 0
    /// DRY: the penalty of a token that continues a repetition. 0: off.
    public var dryMultiplier: Float = 0
    public var dryBase: Float = 1.75
    public var dryAllowedLength = 2
    /// How many tokens are searched for repetitions; nil: as many as the cache holds.
    public var dryPenaltyLastN: Int? = 64
    public var drySequenceBreakers = ["\n", ":", "\"", "*"]
    /// 1 or 2, instead of all samplers but the temperature. 0: off.
    public var mirostat = 0
    public var mirostatTau: Float = 5
    public var mirostatEta: Float = 0.1
    /// With adaptive_p among the samplers: the probability to aim at. Negative: off.
    public var adaptiveTarget: Float = -1
    public var adaptiveDecay: Float = 0.9
    /// Names in order; nil: penalties, dry, top_n_sigma, top_k, typ_p, top_p, min_p, xtc, temperature.
    public var samplers: [String]?
    /// A bias per token, added to its logit.
    public var logitBias: [Int32: Float] = [:]

    public init(seed: UInt32? = nil, temperature: Float = 0.8) {
        self.seed = seed
        self.temperature = temperature
    }
}

public struct AnswerOptions: Sendable, Hashable {
    public var sampling = Sampling()
    /// nil: until the model ends its answer.
    public var maxTokens: Int?
    /// Write on where the model would end.
    public var ignoresEnd = false
    /// End an answer that repeats itself over and over. nil: in conversations, not in plain streams.
    public var endsLoops: Bool?

    public init(sampling: Sampling = Sampling(), maxTokens: Int? = nil, ignoresEnd: Bool = false) {
        self.sampling = sampling
        self.maxTokens = maxTokens
        self.ignoresEnd = ignoresEnd
    }

    func withC<Result>(_ body: (es_app_answer_params) -> Result) throws(EdgeStreamError) -> Result {
        var p = es_app_answer_default_params()
        p.sampling = try sampling.numbers()
        p.max_tokens = try maxTokens.map { n throws(EdgeStreamError) in Int64(try fit(n, "maxTokens") as UInt32) } ?? -1
        p.ignore_eos = ignoresEnd
        p.loop_guard = endsLoops.map { $0 ? 1 : 0 } ?? -1
        let bias = sampling.logitBias.sorted { $0.key < $1.key }.map { es_logit_bias(token: $0.key, bias: $0.value) }
        let samplers = sampling.samplers?.joined(separator: ";")
        for text in sampling.drySequenceBreakers + [samplers ?? ""] {
            try refuseZeroBytes(text)
        }
        return bias.withUnsafeBufferPointer { buffer in
            p.sampling.logit_bias = buffer.baseAddress
            p.sampling.n_logit_bias = buffer.count
            return withOptionalCString(samplers) { order in
                p.sampling.samplers = order
                return withCStrings(sampling.drySequenceBreakers) { breakers in
                    p.sampling.dry_sequence_breakers = breakers.baseAddress
                    p.sampling.n_dry_sequence_breakers = breakers.count
                    return body(p)
                }
            }
        }
    }
}

extension Sampling {
    /// The C parameters, but for what points to memory.
    fileprivate func numbers() throws(EdgeStreamError) -> es_sampler_params {
        var p = es_sampler_default_params()
        p.seed = seed ?? UInt32.max
        p.temp = temperature
        p.top_k = try fit(topK, "topK")
        p.top_p = topP
        p.min_p = minP
        p.typical_p = typicalP
        p.top_n_sigma = topNSigma
        p.min_keep = try fit(minKeep, "minKeep")
        p.xtc_probability = xtcProbability
        p.xtc_threshold = xtcThreshold
        p.dynatemp_range = dynamicTemperatureRange
        p.dynatemp_exponent = dynamicTemperatureExponent
        p.repeat_penalty = repeatPenalty
        p.repeat_last_n = try repeatLastN.map { n throws(EdgeStreamError) in try fit(n, "repeatLastN") } ?? -1
        p.frequency_penalty = frequencyPenalty
        p.presence_penalty = presencePenalty
        p.dry_multiplier = dryMultiplier
        p.dry_base = dryBase
        p.dry_allowed_length = try fit(dryAllowedLength, "dryAllowedLength")
        p.dry_penalty_last_n = try dryPenaltyLastN.map { n throws(EdgeStreamError) in try fit(n, "dryPenaltyLastN") } ?? -1
        p.mirostat = try fit(mirostat, "mirostat")
        p.mirostat_tau = mirostatTau
        p.mirostat_eta = mirostatEta
        p.adaptive_target = adaptiveTarget
        p.adaptive_decay = adaptiveDecay
        return p
    }
}

/// An Int as the number C wants; not negative.
private func fit<Number: FixedWidthInteger>(_ value: Int, _ name: String) throws(EdgeStreamError) -> Number {
    guard value >= 0, let number = Number(exactly: value) else {
        throw EdgeStreamError(.invalid, "\(name) = \(value) is out of range")
    }
    return number
}

/// C would take a zero byte for the end.
func refuseZeroBytes(_ text: String?) throws(EdgeStreamError) {
    if let text, text.utf8.contains(0) {
        throw EdgeStreamError(.invalid, "a text with a zero byte cannot be read")
    }
}

/// Calls body with an array of C strings.
private func withCStrings<Result>(
    _ texts: [String], _ body: (UnsafeBufferPointer<UnsafePointer<CChar>?>) -> Result
) -> Result {
    let copies = texts.map { text in text.withCString { UnsafePointer(strdup($0)) } }
    defer { copies.forEach { free(UnsafeMutablePointer(mutating: $0)) } }
    return copies.withUnsafeBufferPointer(body)
}

private func withOptionalCString<Result>(_ text: String?, _ body: (UnsafePointer<CChar>?) -> Result) -> Result {
    text?.withCString(body) ?? body(nil)
}
