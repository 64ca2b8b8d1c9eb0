import CEdgeStream

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
    /// nil: the model's own; else the name of one of llama.cpp's (chatml, llama3, gemma, ...).
    public var chatTemplate: String?
    public var systemPrompt: String?

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
        return keyType.rawValue.withCString { key in
            valueType.rawValue.withCString { value in
                withOptionalCString(chatTemplate) { template in
                    withOptionalCString(systemPrompt) { system in
                        p.cache_type_k = key
                        p.cache_type_v = value
                        p.chat_template = template
                        p.system = system
                        return body(p)
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
    /// 1: off.
    public var repeatPenalty: Float = 1
    /// How many tokens the penalty looks back on, at most 4096.
    public var repeatLastN = 64
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
        p.sampling.seed = sampling.seed ?? UInt32.max
        p.sampling.temp = sampling.temperature
        p.sampling.top_k = try fit(sampling.topK, "topK")
        p.sampling.top_p = sampling.topP
        p.sampling.min_p = sampling.minP
        p.sampling.repeat_penalty = sampling.repeatPenalty
        p.sampling.repeat_last_n = try fit(sampling.repeatLastN, "repeatLastN")
        p.max_tokens = try maxTokens.map { n throws(EdgeStreamError) in Int64(try fit(n, "maxTokens") as UInt32) } ?? -1
        p.ignore_eos = ignoresEnd
        p.loop_guard = endsLoops.map { $0 ? 1 : 0 } ?? -1
        let bias = sampling.logitBias.sorted { $0.key < $1.key }.map { es_logit_bias(token: $0.key, bias: $0.value) }
        return bias.withUnsafeBufferPointer { buffer in
            p.sampling.logit_bias = buffer.baseAddress
            p.sampling.n_logit_bias = buffer.count
            return body(p)
        }
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

private func withOptionalCString<Result>(_ text: String?, _ body: (UnsafePointer<CChar>?) -> Result) -> Result {
    text?.withCString(body) ?? body(nil)
}
