import CEdgeStream
import Foundation

public struct ModelInfo: Sendable, Hashable {
    /// llama.cpp's description, such as "llama 134M Q4_1".
    public let name: String
    public let parameterCount: UInt64
    /// Of all tensors.
    public let byteCount: UInt64
    /// Of metadata, vocabulary and tensor sizes, with a sample of the weights: sessions belong to it.
    public let fingerprint: UInt64
    public let tag: UInt64
    public let vocabularySize: Int
    public let trainedContextSize: Int
    public let recommendedContextSize: Int
    public let recommendedSinks: Int
    public let hasChatTemplate: Bool

    init(_ c: es_app_model_info) {
        name = withUnsafeBytes(of: c.name) { String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self) }
        parameterCount = c.n_params
        byteCount = c.n_bytes
        fingerprint = c.fingerprint
        tag = c.tag
        vocabularySize = Int(c.n_vocab)
        trainedContextSize = Int(c.n_ctx_train)
        recommendedContextSize = Int(c.n_ctx)
        recommendedSinks = Int(c.n_keep)
        hasChatTemplate = c.has_chat_template
    }
}

/// What a session takes, in bytes, computed without loading weights. An app has some MiB of its own besides.
public struct MemoryNeed: Sendable, Hashable {
    /// Clean pages of the file where it is mapped.
    public let weights: UInt64
    /// Keys and values of `contextSize` tokens.
    public let cache: UInt64
    /// Exact copies of the sinks' keys.
    public let sinks: UInt64
    /// Scratch of a decode.
    public let compute: UInt64
    public let contextSize: Int
    /// Pinned tokens, the system prompt included.
    public let pinned: Int

    public var total: UInt64 { weights + cache + sinks + compute }
    /// While the session is saved or restored, which takes one more copy of the cache for a moment.
    public var peak: UInt64 { total + cache }
}

/// A loaded model. Several sessions may share one. It is immutable, and freed when nothing refers to it any more.
public final class Model: Sendable {
    public let info: ModelInfo
    public let url: URL
    nonisolated(unsafe) let handle: OpaquePointer

    private init(handle: OpaquePointer, url: URL) throws(EdgeStreamError) {
        var c = es_app_model_info()
        try EdgeStreamError.check(es_app_model_get_info(handle, &c))
        (self.handle, self.url, info) = (handle, url, ModelInfo(c))
    }

    deinit {
        es_app_model_free(handle)
    }

    /// Loads a GGUF file. Cancelling the task stops it: `.stopped`. `.unsupported` says why a model cannot stream.
    public static func load(
        _ url: URL, options: LoadOptions = LoadOptions(), onProgress: ProgressHandler? = nil
    ) async throws(EdgeStreamError) -> Model {
        let params = try options.c()
        nonisolated(unsafe) let sent = params
        return try await onThread("load") { isCancelled throws(EdgeStreamError) in
            var handle: OpaquePointer?
            let status = withProgress(onProgress, isCancelled: isCancelled) { callback, user in
                var params = sent
                params.on_progress = callback
                params.user = user
                return es_app_model_load(url.path, params, &handle)
            }
            try EdgeStreamError.check(status)
            guard let handle else { throw EdgeStreamError(.internal, "there is no model") }
            return try Model(handle: handle, url: url)
        }
    }

    /// What a session of this file would take. Reads metadata only.
    public static func memoryNeed(
        of url: URL, session: SessionOptions, load: LoadOptions = LoadOptions()
    ) async throws(EdgeStreamError) -> MemoryNeed {
        try await onThread("measure") { _ throws(EdgeStreamError) in
            var need = es_app_memory()
            let model = try load.c()
            try EdgeStreamError.check(try session.withC { es_app_memory_need(url.path, model, $0, &need) })
            return MemoryNeed(
                weights: need.weights, cache: need.cache, sinks: need.sinks, compute: need.compute,
                contextSize: Int(need.n_ctx), pinned: Int(need.n_keep))
        }
    }

    /// Nil if a conversation is possible, as it is unless the template is broken; else one sentence that says why not.
    public func whyItCannotChat(template: String? = nil) -> String? {
        var reason = [CChar](repeating: 0, count: 512)
        let can = if let template {
            es_app_model_can_chat(handle, template, &reason, reason.count)
        } else {
            es_app_model_can_chat(handle, nil, &reason, reason.count)
        }
        return can ? nil : String(decoding: reason.prefix { $0 != 0 }.map(UInt8.init(bitPattern:)), as: UTF8.self)
    }

    /// Tokens of a text. `special`: text such as <|im_end|> becomes the control token that it spells.
    public func tokenize(_ text: String, addBOS: Bool = false, special: Bool = false) throws(EdgeStreamError) -> [Int32] {
        try refuseZeroBytes(text)
        var tokens = [Int32](repeating: 0, count: text.utf8.count + 2)
        var count = es_app_tokenize(handle, text, addBOS, special, &tokens, tokens.count)
        if count > tokens.count {
            tokens = [Int32](repeating: 0, count: Int(count))
            count = es_app_tokenize(handle, text, addBOS, special, &tokens, tokens.count)
        }
        guard count >= 0 else { throw EdgeStreamError(.invalid, String(cString: es_last_error())) }
        return Array(tokens.prefix(Int(count)))
    }

    /// The bytes of a token, which may end inside a character. Control tokens have none.
    public func bytes(of token: Int32) throws(EdgeStreamError) -> [UInt8] {
        var bytes = [CChar](repeating: 0, count: 64)
        var count = es_app_token_bytes(handle, token, &bytes, bytes.count)
        if count > bytes.count {
            bytes = [CChar](repeating: 0, count: Int(count))
            count = es_app_token_bytes(handle, token, &bytes, bytes.count)
        }
        guard count >= 0 else { throw EdgeStreamError(.invalid, String(cString: es_last_error())) }
        return bytes.prefix(Int(count)).map(UInt8.init(bitPattern:))
    }
}

/// SHA-256 of a file, as 64 hexadecimal digits. Cancelling the task stops it.
public func sha256(of url: URL, onProgress: ProgressHandler? = nil) async throws(EdgeStreamError) -> String {
    try await onThread("checksum") { isCancelled throws(EdgeStreamError) in
        var digits = [CChar](repeating: 0, count: 65)
        let status = withProgress(onProgress, isCancelled: isCancelled) { callback, user in
            es_app_file_sha256(url.path, callback, user, &digits)
        }
        try EdgeStreamError.check(status)
        return String(decoding: digits.prefix(64).map(UInt8.init(bitPattern:)), as: UTF8.self)
    }
}
